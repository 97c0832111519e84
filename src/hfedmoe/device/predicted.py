"""The memory peaks that `hfedmoe plan` predicts, for simulated clients, whose own cannot be measured."""

import functools
from collections.abc import Callable

from hfedmoe.config import RunConfig
from hfedmoe.device.capacity import workload_for
from hfedmoe.device.planner import Planner


def peaks_of(config: RunConfig, device: str) -> Callable[[int, int], int]:
    """A function from a client's number and the experts that it holds to the peak bytes of its device.

    Args:
        device: where the memory is, as torch names it.

    Raises:
        UserError: the model cannot be planned for.
    """
    planner, budgets = Planner(config), config.clients.budgets

    @functools.cache
    def peak(budget: int, experts: int) -> int:
        return planner.forecast(experts, workload_for(budgets[budget], config, device)).highest

    return lambda client, experts: peak(client % len(budgets), experts)
