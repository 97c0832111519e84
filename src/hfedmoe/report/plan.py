"""Plan a federation: which devices could take part, with how many experts, and what each needs."""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from hfedmoe.config import RunConfig
from hfedmoe.config.budgets import AUTO, Budget, budget_of, in_bytes, in_experts, is_count
from hfedmoe.config.presets import PRESETS
from hfedmoe.device.capacity import workload_for
from hfedmoe.device.forecast import Change, Forecast
from hfedmoe.device.planner import MARGIN, Planner, rehearsable
from hfedmoe.device.probe import probe
from hfedmoe.device.workload import Workload
from hfedmoe.errors import UserError
from hfedmoe.models.carved import check_stored, quantisation_of
from hfedmoe.models.loaded import device_of
from hfedmoe.models.names import LOADED_WHOLE


@dataclass(frozen=True)
class AskedBudget:
    """A budget to plan for."""

    budget: Budget
    clients: int | None = None
    """Number of clients with this budget in the configuration; None: a device given by the user."""
    deadlines_s: tuple[float, ...] = ()


@dataclass(frozen=True)
class Deadline:
    """A deadline for a round of local training."""

    deadline_s: float
    steps: int | None
    """Steps at full size that fit, at least 1, because one step is always done; None: the speed is unknown."""


@dataclass(frozen=True)
class DevicePlan:
    """The plan for one device."""

    budget: Budget
    clients: int | None
    memory_bytes: int | None
    """None: the budget is a number or share of experts."""
    limit: str | None
    """What limits the memory, if it was measured."""
    device_type: str
    fits: bool | None
    """Whether the device can take part; None: its budget is a number of experts, so its memory is unknown."""
    asked: int | None
    """Experts over all layers, if the budget is a number or share of experts."""
    forecast: Forecast
    """For the experts that it would hold, or for the fewest that can train if it cannot take part."""
    otherwise: Forecast
    """The same with the other choice of gradient checkpointing."""
    rehearsed_on: str
    """Device type on which the step was rehearsed: the device's own type, or another if torch lacks that here."""
    flops_per_second: float | None
    seconds_per_step: float | None
    seconds_per_round: float | None
    """Time for the configured steps, without messages and the first pass over the data."""
    deadlines: list[Deadline]
    change: Change | None
    """The smallest change of settings with which it could take part."""

    @property
    def needed_bytes(self) -> int:
        """The highest memory use in the forecast, with the safety margin."""
        return self.forecast.needed(MARGIN)

    @property
    def name(self) -> str:
        """The budget in words."""
        if isinstance(self.budget, int):
            return f"{self.budget} expert{'s' if self.budget > 1 else ''}"
        return str(self.budget).strip()


@dataclass(frozen=True)
class Plan:
    """The plan for a model and some devices."""

    config: RunConfig
    workload: Workload
    num_experts: list[int]
    top_k: list[int]
    smallest: int
    """The fewest experts over all layers that can train."""
    devices: list[DevicePlan]
    quantised: str | None = None
    """The method by which the checkpoint is quantised; None: it is not."""

    @property
    def carved(self) -> bool:
        """Whether devices can read single experts from a safetensors checkpoint, judged by the model's name."""
        model = self.config.model
        plain = model.upcycle is None and model.name not in LOADED_WHOLE and not model.name.endswith(".gguf")
        return plain and self.quantised is None


def plan_for(config: RunConfig, devices: list[str] | None = None) -> Plan:
    """Plan for some devices, each given as a budget; None: for the budgets of the configuration's clients.

    Raises:
        UserError: the model cannot be planned for, or a device is not a valid budget.
    """
    entries = _asked(config, devices) if devices else _configured(config)
    planner = Planner(config)
    quantised = quantisation_of(config.model)
    if quantised is None:
        check_stored(config.model)
    return Plan(
        config=config,
        workload=planner.workload,
        num_experts=planner.num_experts,
        top_k=planner.top_k,
        smallest=planner.smallest,
        devices=[_device_plan(entry, planner) for entry in entries],
        quantised=quantised,
    )


def to_json(plan: Plan) -> str:
    """The plan as JSON."""
    tree = {
        "model": plan.config.model.name,
        "num_experts": plan.num_experts,
        "top_k": plan.top_k,
        "smallest": plan.smallest,
        "margin": MARGIN,
        "workload": asdict(plan.workload),
        "steps_per_round": plan.config.train.steps,
        "devices": [_device_tree(device) for device in plan.devices],
    }
    return json.dumps(tree, indent=2)


def _device_tree(device: DevicePlan) -> dict[str, Any]:
    tree = asdict(device)
    tree["forecast"] = _forecast_tree(device.forecast)
    tree["otherwise"] = _forecast_tree(device.otherwise)
    return tree | {"needed_bytes": device.needed_bytes}


def _forecast_tree(forecast: Forecast) -> dict[str, Any]:
    extra = {"num_residents": forecast.num_residents, "peak": forecast.peak, "highest": forecast.highest}
    return asdict(forecast) | extra


def _asked(config: RunConfig, devices: list[str]) -> list[AskedBudget]:
    deadlines = tuple(sorted(set(config.clients.deadlines_s or [])))
    return [AskedBudget(_budget(text), None, deadlines) for text in dict.fromkeys(devices)]


def _budget(text: str) -> Budget:
    """A budget from the command line. Raises UserError."""
    try:
        return budget_of(text)
    except ValueError as error:
        raise UserError(f"--device {error}") from None


def _configured(config: RunConfig) -> list[AskedBudget]:
    """The distinct budgets of the clients, in order, with the deadlines of their clients."""
    clients = config.clients
    found: dict[Budget, list[int]] = {}
    for number in range(clients.count):
        found.setdefault(clients.budgets[number % len(clients.budgets)], []).append(number)
    entries = []
    for budget, numbers in found.items():
        deadlines = clients.deadlines_s
        own = {deadlines[number % len(deadlines)] for number in numbers} if deadlines else set()
        entries.append(AskedBudget(budget, len(numbers), tuple(sorted(own))))
    return entries


@dataclass(frozen=True)
class _Offer:
    """What a budget offers: workload, memory and speed."""

    workload: Workload
    memory_bytes: int | None = None
    limit: str | None = None
    flops: float | None = None


def _offer(budget: Budget, planner: Planner) -> _Offer:
    config = planner.config
    device = str(device_of(config.model.device))
    workload = workload_for(budget, config, device)
    if budget == AUTO:
        found = probe(device)
        return _Offer(workload, found.memory_bytes, found.limit, found.flops)
    flops = PRESETS[str(budget)].flops if budget in PRESETS else None
    return _Offer(workload, in_bytes(budget), None, flops)


def _device_plan(entry: AskedBudget, planner: Planner) -> DevicePlan:
    budget = entry.budget
    offer = _offer(budget, planner)
    workload, memory = offer.workload, offer.memory_bytes
    asked, change = None, None
    fits: bool | None
    if memory is None:
        assert is_count(budget)
        asked = in_experts(budget, sum(planner.num_experts))
        fits = None if asked >= planner.smallest else False
        forecast = planner.forecast(max(asked, planner.smallest), workload)
    else:
        fit = planner.fit(memory, workload)
        fits, forecast = fit.fits, fit.forecast
        change = None if fits else planner.smallest_change(memory, workload)
    other = replace(workload, gradient_checkpointing=not workload.gradient_checkpointing)
    steps = planner.config.train.steps
    step_s = None if offer.flops is None else forecast.seconds_per_step(offer.flops)
    return DevicePlan(
        budget=budget,
        clients=entry.clients,
        memory_bytes=memory,
        limit=offer.limit,
        device_type=workload.device,
        fits=fits,
        asked=asked,
        forecast=forecast,
        otherwise=planner.forecast(forecast.residents, other),
        rehearsed_on=rehearsable(workload.device),
        flops_per_second=offer.flops,
        seconds_per_step=step_s,
        seconds_per_round=None if step_s is None else step_s * steps,
        deadlines=[Deadline(seconds, _steps_in(seconds, step_s, steps)) for seconds in entry.deadlines_s],
        change=change,
    )


def _steps_in(deadline_s: float, step_s: float | None, steps: int) -> int | None:
    if step_s is None:
        return None
    return min(steps, max(1, int(deadline_s / step_s)))
