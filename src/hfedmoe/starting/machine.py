"""What of a model fits into this machine, and how long a run takes at least."""

from dataclasses import dataclass

from hfedmoe.config import RunConfig
from hfedmoe.config.budgets import AUTO
from hfedmoe.device.beside import beside
from hfedmoe.device.capacity import workload_for
from hfedmoe.device.planner import MARGIN, Planner
from hfedmoe.device.probe import available_memory, matmul_flops
from hfedmoe.models.loaded import device_of


@dataclass(frozen=True)
class Machine:
    """A run of a configuration on this machine."""

    free_bytes: int
    needed_bytes: int
    """With all experts, safety margin included: a simulation needs them in memory."""
    share: int
    """Percent of the experts that a device with this memory could hold; 0: not even top-k in every layer."""
    seconds: float
    """Of all steps of all clients at the speed of a large matrix product: at least as long as this."""

    @property
    def fits(self) -> bool:
        """Whether the simulation fits."""
        return self.needed_bytes <= self.free_bytes


def machine_for(config: RunConfig) -> Machine:
    """Plan for a simulation on this machine. Raises UserError if the model cannot be planned for."""
    device = str(device_of(config.model.device))
    planner = Planner(config)
    workload = workload_for(AUTO, config, device)
    free, _ = available_memory(device)
    total = sum(planner.num_experts)
    forecast = planner.forecast(total, workload)
    needed = round(forecast.highest * MARGIN)
    share = 100 if needed <= free else 100 * planner.fit(free + beside(workload.device), workload).residents // total
    clients = config.federation.clients_per_round or config.clients.count
    steps = config.federation.rounds * config.train.steps * clients
    return Machine(free, needed, share, steps * forecast.seconds_per_step(matmul_flops(device)))
