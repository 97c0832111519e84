"""What the GPU does in a step of our layer: its kernels, how often the host waits for it, and fragmented memory.

    python -m benchmarks.gpu_profile --traces DIRECTORY [--dry]

is the process that measures, and prints one JSON object per finding. `measure` runs it.
"""

import argparse
import gc
import json
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.gpu_arms import target
from benchmarks.gpu_layer import OLMOE, TINY, Batch, Layer, Shape, batch_of, routing_of
from benchmarks.gpu_ours import ours
from benchmarks.gpu_process import rows_of
from benchmarks.gpu_timing import wait

ARMS: dict[str, Callable[[Shape, torch.device, torch.dtype], Layer]] = {
    "lora": ours,
    "frozen": partial(ours, lora=False),
    "4bit": partial(ours, held="4bit"),
    "store": partial(ours, held="same"),
}
EXPECTED_WAITS = 1
"""Per step: the forward pass reads how many rows each expert has. The backward pass reads nothing."""
STEPS = 3
"""Profiled, after as many that are not."""
LONG_RUN = 50
"""Steps with another routing each."""
EARLY = 5
"""The step with whose memory that of the last one is compared."""
WAITING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
TOP = 25
"""Kernels in the rows; the tables beside them have all."""
SHOWN = 16
"""Kernels that people see at the end."""
Row = dict[str, Any]


def measure(minutes: float, dry: bool, traces: Path) -> list[Row]:
    """What was found of all arms; rows with `error` say what failed.

    Args:
        traces: directory for Chrome traces and tables of kernels.
    """
    arguments = ["--traces", str(traces), *(["--dry"] if dry else [])]
    rows, failure = rows_of("benchmarks.gpu_profile", arguments, 60 * minutes)
    if failure is not None and not any("error" in row for row in rows):
        rows.append({"arm": "all", "error": failure})
    for row in rows:
        print(line(row), flush=True)
    return rows


def line(row: Row) -> str:
    """A row for people."""
    if "error" in row:
        return f"profile {row['arm']}: {row['error'].strip().splitlines()[-1][:100]}"
    return f"profile {row['arm']}: " + ", ".join(
        f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
        if key not in ("arm", "kernels")
    )


def kernels(rows: list[Row]) -> list[str]:
    """The first lines of the table of kernels of our layer with LoRA, for people."""
    return next((list(row["kernels"])[:SHOWN] for row in rows if "kernels" in row), [])


def failures(rows: list[Row]) -> list[str]:
    """What went wrong: errors, and steps in which the host waits more often than it must."""
    found = [f"profile {row['arm']}: {row['error']}" for row in rows if "error" in row]
    for row in rows:
        if row.get("waits_per_step", EXPECTED_WAITS) != EXPECTED_WAITS:
            found.append(f"profile {row['arm']}: {row['waits_per_step']} waits per step, at {row['waits_at']}")
    return found


def main() -> int:
    """Profile all arms, one after the other."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--traces", type=Path, required=True)
    arguments.add_argument("--dry", action="store_true")
    given = arguments.parse_args()
    device, dtype = target(given.dry)
    torch.manual_seed(0)
    shape, tokens = (TINY, 128) if given.dry else (OLMOE, 8192)
    failed = False
    for arm, build in ARMS.items():
        try:
            layer, batch = build(shape, device, dtype), batch_of(shape, tokens, device, dtype)
            for _ in range(STEPS):
                _step(layer, batch)
            wait(device)
        except Exception:
            print(json.dumps({"arm": arm, "error": traceback.format_exc()}), flush=True)
            failed = True
            continue
        parts: list[Callable[[], Row]] = [
            partial(waits, layer, batch, device),
            partial(memory, layer, batch, shape, device),
            partial(profiled, layer, batch, device, given.traces, arm),
        ]
        for part in parts:
            try:
                row = part()
            except Exception:
                row, failed = {"error": traceback.format_exc()}, True
            print(json.dumps({"arm": arm, **row}), flush=True)
        del layer, batch, parts, part
        gc.collect()
    return int(failed)


def waits(layer: Layer, batch: Batch, device: torch.device) -> Row:
    """How often the host waits for the GPU in a step, as torch counts it, and in which lines; nothing on a CPU."""
    if device.type != "cuda":
        return {"waits": "needs CUDA"}
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(STEPS):
                _step(layer, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(
        f"{Path(one.filename).name}:{one.lineno}" for one in caught if "called a synchronizing" in str(one.message)
    )
    return {"waits_per_step": places.total() / STEPS, "waits_at": dict(places)}


def memory(layer: Layer, batch: Batch, shape: Shape, device: torch.device) -> Row:
    """Reserved and allocated bytes early and late in a run whose routing changes in every step."""
    row: Row = {"steps": LONG_RUN}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    for step in range(1, LONG_RUN + 1):
        index, weights = routing_of(shape, len(batch.x), device, batch.x.dtype, seed=step)
        _step(layer, Batch(batch.x, index, weights, batch.grad))
        if device.type == "cuda" and step in (EARLY, LONG_RUN):
            statistics = torch.cuda.memory_stats(device)
            row[f"reserved_gb_{step}"] = statistics["reserved_bytes.all.current"] / 1e9
            row[f"peak_gb_{step}"] = statistics["allocated_bytes.all.peak"] / 1e9
            row[f"reserved_per_peak_{step}"] = row[f"reserved_gb_{step}"] / row[f"peak_gb_{step}"]
            row["retries"] = statistics["num_alloc_retries"]
    return row


def profiled(layer: Layer, batch: Batch, device: torch.device, traces: Path, arm: str) -> Row:
    """The kernels with the most time; writes a Chrome trace and the full table."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as found:
        for _ in range(STEPS):
            with record_function("layer step"):
                _step(layer, batch)
        wait(device)
    averages = found.key_averages()
    on_gpu = device.type == "cuda"
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    total = sum(getattr(event, own) for event in averages if _is_work(event, on_gpu))
    busiest = sorted((e for e in averages if _is_work(e, on_gpu)), key=lambda e: getattr(e, own), reverse=True)
    table = [
        f"{getattr(event, own) / STEPS / 1e3:8.3f} ms {event.count / STEPS:7.1f}x {event.key[:90]}"
        for event in busiest[:TOP]
    ]
    traces.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(traces / f"{arm}.trace.json.gz"))
    (traces / f"{arm}.table.txt").write_text(
        averages.table(sort_by=own, row_limit=100, max_name_column_width=100) + "\n"
    )
    steps = [event.time_range for event in found.events() or [] if event.name == "layer step" and not _on_gpu(event)]
    calls = Counter(
        event.name
        for event in found.events() or []
        if event.name in WAITING and any(s.start <= event.time_range.start <= s.end for s in steps)
    )
    row: Row = {"busy_ms_per_step": total / STEPS / 1e3, "kernels": table}
    if on_gpu:
        copies = sum(event.count for event in averages if "DtoH" in event.key) / STEPS
        launches = sum(event.count for event in busiest) / STEPS
        row |= {"launches_per_step": launches, "copies_to_host_per_step": copies}
        row["runtime_waits_per_step"] = {name: number / STEPS for name, number in calls.items()}
    return row


def _is_work(event: Any, on_gpu: bool) -> bool:
    """Whether it is a kernel or a copy on the GPU (an operator on a CPU), and not a label of ours."""
    return event.key != "layer step" and (_on_gpu(event) or not on_gpu)


def _on_gpu(event: Any) -> bool:
    return bool(event.device_type == torch.autograd.DeviceType.CUDA)


def _step(layer: Layer, batch: Batch) -> None:
    layer.clear(batch)
    layer.step(batch)


if __name__ == "__main__":
    sys.exit(main())
