"""Print a plan as a page of text."""

import math
import textwrap
from collections.abc import Iterator

from hfedmoe.device.planner import MARGIN
from hfedmoe.device.workload import Workload
from hfedmoe.report.device_presets import human_flops
from hfedmoe.report.plan import DevicePlan, Plan
from hfedmoe.report.table import WIDTH, table, tables
from hfedmoe.report.told import alone_words, tuning_words
from hfedmoe.report.words import human_bytes, human_seconds

NAMES = {
    "framework": "framework (Python, torch)",
    "embeddings_head": "embeddings and head",
    "attention": "attention",
    "other_base": "norms, dense blocks, shared experts",
    "routers": "routers",
    "experts": "resident experts",
    "adapters": "LoRA adapters",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "logits": "logits",
    "buffers": "messages",
}
"""Kind of memory (`forecast.KINDS`) -> its name in the report."""


def as_text(plan: Plan) -> str:
    """An overview of the devices, bytes by kind, and notes on problems."""
    lines = [
        f"{plan.config.model.name}: {len(plan.num_experts)} MoE layers, {sum(plan.num_experts)} experts, "
        f"top-{max(plan.top_k)}",
        f"{_work(plan.workload)}; {plan.config.train.steps} steps a round",
        "",
        *_overview(plan),
    ]
    deadlines = _deadlines(plan)
    if deadlines:
        lines += ["", *deadlines]
    for part in _kinds(plan):
        lines += ["", *part]
    notes = list(_notes(plan))
    return "\n".join([*lines, "", *notes])


def _work(workload: Workload) -> str:
    """The training step in a few words."""
    trained = {"lora": f"LoRA rank {workload.rank}", "full": "full training", "frozen": "experts frozen"}
    parts = [
        trained[workload.experts],
        f"{workload.batch_size} rows of at most {workload.length} tokens a step",
        workload.dtype,
    ]
    if workload.expert_dtype not in ("same", workload.dtype):
        parts.append(f"experts in {workload.expert_dtype}")
    if workload.gradient_checkpointing:
        parts.append("gradient checkpointing")
    return ", ".join(parts)


def _overview(plan: Plan) -> list[str]:
    first = "device" if plan.devices[0].clients is None else "budget x clients"
    head = [first, "memory", "fits", "experts/layer", "experts", "peak", "step", "round", "down", "up"]
    rows = []
    for device in plan.devices:
        forecast = device.forecast
        rows.append(
            [
                device.name if device.clients is None else f"{device.name} x{device.clients}",
                human_bytes(device.memory_bytes),
                {True: "yes", False: "no", None: "-"}[device.fits],
                f"{_span(forecast.residents)} of {_span(plan.num_experts)}",
                f"{forecast.num_residents}",
                human_bytes(forecast.highest),
                _seconds(device.seconds_per_step),
                _seconds(device.seconds_per_round),
                human_bytes(forecast.bytes_down),
                human_bytes(forecast.bytes_up),
            ]
        )
    return table(head, rows)


def _span(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low}-{high}"


def _seconds(seconds: float | None) -> str:
    if seconds is not None and seconds < 0.1:
        return "<0.1 s"
    return human_seconds(seconds)


def _deadlines(plan: Plan) -> list[str]:
    steps = plan.config.train.steps
    rows = [
        [
            device.name,
            f"{deadline.deadline_s:g} s",
            _seconds(device.seconds_per_round),
            f"{deadline.steps} of {steps}",
        ]
        for device in plan.devices
        for deadline in device.deadlines
        if deadline.steps is not None
    ]
    return table(["device", "deadline", "round", "steps at full size"], rows) if rows else []


def _kinds(plan: Plan) -> list[list[str]]:
    """Bytes by kind: a row per kind and a column per device, in tables that fit the page width."""

    def row(title: str, sizes: list[int]) -> list[str]:
        return [title, *(human_bytes(size) for size in sizes)]

    forecasts = [device.forecast for device in plan.devices]
    rows = [
        row(title, sizes)
        for kind, title in NAMES.items()
        if any(sizes := [forecast.kinds[kind] for forecast in forecasts])
    ]
    rows.append(row("training peak", [forecast.peak for forecast in forecasts]))
    rows.append(row("while loading", [forecast.loading_peak for forecast in forecasts]))
    rows.append(row("first pass, streamed", [forecast.bootstrap_peak for forecast in forecasts]))
    others = [device.otherwise for device in plan.devices]
    other = "without" if plan.workload.gradient_checkpointing else "with"
    rows.append(row(f"activations {other} checkpointing", [forecast.kinds["activations"] for forecast in others]))
    rows.append(row(f"training peak {other} checkpointing", [forecast.peak for forecast in others]))
    return tables(["bytes by kind", *(device.name for device in plan.devices)], rows)


def _notes(plan: Plan) -> Iterator[str]:
    others = max(device.forecast.beside for device in plan.devices)
    beside = f", and up to {human_bytes(others)} for `hfedmoe join` and Flower's SuperNode" if others else ""
    yield from _wrapped(
        "Peak is the highest memory use of training at any time: loading, first pass or training. A device fits if it "
        f"has that and {_percent(MARGIN)} more{beside}. Step and round are training at the device's sustained speed. "
        "Down and up are a client's messages of a round."
    )
    for device in plan.devices:
        if device.limit is not None:
            speed = "" if device.flops_per_second is None else human_flops(device.flops_per_second)
            yield from _wrapped(
                f"{device.name}: {human_bytes(device.memory_bytes)} is the {device.limit}; {speed} is the speed of a "
                "large matrix product here, so a step takes at least as long as shown."
            )
    if unknown := [device.name for device in plan.devices if device.deadlines and device.flops_per_second is None]:
        yield from _wrapped(f"Deadlines: the speed of {', '.join(unknown)} is not known; use a named device or auto.")
    elsewhere = {device.device_type for device in plan.devices if device.rehearsed_on != device.device_type}
    if elsewhere:
        yield from _wrapped(
            f"Activations of {' and '.join(sorted(elsewhere))} devices are those of a CPU: torch here lacks this type."
        )
    for device in plan.devices:
        if device.fits is False:
            yield from _refusal(plan, device)
    if not plan.carved:
        way_out = " (`hfedmoe upcycle` writes one)" if plan.config.model.upcycle is not None else ""
        yield from _wrapped(
            "A device can leave experts on disk only if the model is a safetensors checkpoint, and this one is not"
            f"{way_out}. So a deployed device holds all experts; simulated clients share one model."
        )
    if plan.config.method.residency == "all":
        yield from _wrapped('method.residency = "all": a run with these settings ignores budgets.')
    if plan.config.evaluation.tune_steps:
        yield from _wrapped(f"{tuning_words(plan.config)}.")
    if plan.config.evaluation.alone:
        yield from _wrapped(f"{alone_words(plan.config.clients.count)}.")


def _refusal(plan: Plan, device: DevicePlan) -> Iterator[str]:
    least = f"top-{max(plan.top_k)} routing in {len(plan.num_experts)} layers needs at least {plan.smallest}"
    if device.asked is not None:
        share = math.ceil(100 * plan.smallest / sum(plan.num_experts))
        number = "" if isinstance(device.budget, int) else f" ({device.asked} experts)"
        yield from _wrapped(f'{device.name}{number}: too few: {least} ("{share}%"), as shown.')
        return
    text = f"{device.name}: {least} experts, as shown, and {_gib(device.needed_bytes)} all in all."
    if device.change is None:
        yield from _wrapped(f"{text} No change of settings fits; use a smaller model.")
        return
    yield from _wrapped(f"{text} The smallest change that fits needs {_gib(device.change.needed_bytes)}:")
    yield "  " + " ".join(f"--set {key}={_value(value)}" for key, value in device.change.settings.items())


def _value(value: object) -> str:
    """A value in the form that `--set` reads."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _percent(factor: float) -> str:
    return f"{100 * (factor - 1):.0f} %"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
