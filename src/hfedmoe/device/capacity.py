"""Convert the budgets of a configuration into numbers of experts."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from hfedmoe.config import RunConfig
from hfedmoe.config.budgets import AUTO, Budget, in_bytes, in_experts, is_count
from hfedmoe.config.presets import PRESETS
from hfedmoe.errors import UserError

if TYPE_CHECKING:
    from hfedmoe.device.planner import Planner
    from hfedmoe.device.workload import Workload

Plan = Callable[[], "Planner"]


def planner_of(config: RunConfig) -> Plan:
    """Makes the planner on its first call: budgets in experts or shares do not need one."""

    @functools.cache
    def plan() -> "Planner":
        from hfedmoe.device.planner import Planner

        return Planner(config)

    return plan


def memory_of(budget: Budget, device: str) -> int | None:
    """Bytes that a budget stands for on a device (as torch names it); None for a number or share of experts."""
    if budget == AUTO:
        from hfedmoe.device.probe import available_memory

        return available_memory(device)[0]
    return in_bytes(budget)


def workload_for(budget: Budget, config: RunConfig, device: str) -> "Workload":
    """The configured step on the device of the budget: that of a preset, or else `device` (as torch names it)."""
    from hfedmoe.device.workload import Workload

    return Workload.on(PRESETS[str(budget)].device if budget in PRESETS else device.partition(":")[0], config)


def experts_of(budget: Budget, num_experts: list[int], top_k: list[int], plan: Plan, device: str) -> int:
    """Number of experts over all layers that a budget allows.

    Args:
        num_experts, top_k: of the model, per layer.
        device: where the memory is, as torch names it.

    Raises:
        UserError: the budget cannot hold top-k experts in every layer; the message says what would help.
    """
    total, layers = sum(num_experts), len(num_experts)
    needed = max(top_k) * layers
    if is_count(budget):
        number = in_experts(budget, total)
        if number < needed:
            share = -(-100 * needed // total)
            raise UserError(
                f"clients.budgets: {budget!r} is {number} of {total} experts, but top-{max(top_k)} routing in {layers} "
                f'layers needs at least {needed} ("{share}%")'
            )
        return number
    memory = memory_of(budget, device)
    assert memory is not None
    planner = plan()
    workload = workload_for(budget, planner.config, device)
    fit = planner.fit(memory, workload)
    if fit.fits:
        return fit.residents
    change = planner.smallest_change(memory, workload)
    way_out = "no change of settings is enough: use a smaller model" if change is None else f"it can with {change}"
    raise UserError(
        f"clients.budgets: {budget!r} ({_gib(memory)}) cannot hold the {needed} experts that top-{max(top_k)} routing "
        f"in {layers} layers needs: that takes {_gib(fit.needed_bytes)}; {way_out}"
    )


def budgets_in_experts(config: RunConfig, num_experts: list[int], top_k: list[int], device: str) -> list[int]:
    """Number of experts over all layers, for every client; equal budgets are planned once. Raises UserError."""
    plan, known = planner_of(config), dict[Budget, int]()
    budgets = config.clients.budgets
    for budget in budgets[: config.clients.count]:
        if budget not in known:
            known[budget] = experts_of(budget, num_experts, top_k, plan, device)
    return [known[budgets[number % len(budgets)]] for number in range(config.clients.count)]


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
