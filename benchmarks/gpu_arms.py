"""One arm of the comparison, in a process of its own: builds the layer for each cell (a shape and a number of tokens)
and measures it.

    python -m benchmarks.gpu_arms ours --cells olmoe:8192,qwen3:8192 --seconds 30 [--dry]

Prints one JSON object per cell. Cells that do not fit the time are not begun.
"""

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks import gpu_rivals
from benchmarks.gpu_bare import products
from benchmarks.gpu_layer import SHAPES, Batch, Layer, Shape, batch_of
from benchmarks.gpu_ours import ours
from benchmarks.gpu_timing import timed, wait


@dataclass(frozen=True)
class Arm:
    """One implementation, and how it computes."""

    build: Callable[[Shape, torch.device, torch.dtype], Layer] | None
    """None: the bare products."""
    precision: str
    """Of the frozen weights."""
    lora: bool
    environment: dict[str, str] = field(default_factory=dict)


ARMS = {
    "ours": Arm(ours, "16bit", True),
    "bare": Arm(None, "16bit", True),
    "ours frozen": Arm(partial(ours, lora=False), "16bit", False),
    "stock frozen": Arm(gpu_rivals.stock, "16bit", False),
    "peft": Arm(gpu_rivals.peft, "16bit", True),
    "e4b nf4": Arm(gpu_rivals.experts4bit, "4bit", True),
    "ours 4bit": Arm(partial(ours, held="4bit"), "4bit", True),
    "ours store": Arm(partial(ours, held="same"), "16bit", True),
    "ours 8bit": Arm(partial(ours, held="8bit"), "8bit", True),
    "e4b 16bit": Arm(partial(gpu_rivals.experts4bit, quant_type="bf16"), "16bit", True),
    "e4b nf4 f32": Arm(partial(gpu_rivals.experts4bit, adapters="float32"), "4bit", True),
    # Not a default of theirs: grouped products for A and B too, which they have for Hopper only.
    "e4b nf4 mm": Arm(gpu_rivals.experts4bit, "4bit", True, {"NF4_QLORA_LORA_PATH": "grouped_mm"}),
}
"""In their order of importance."""
ON_GPU_ONLY = {"e4b nf4 mm": "needs CUDA"}
SECONDS = {"cuda": 2.5, "cpu": 0.1}
"""The timing of one cell takes about this long at most, twice with the optimizer."""


def main() -> int:
    """Measure one arm."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("arm", choices=ARMS)
    arguments.add_argument("--cells", required=True)
    arguments.add_argument("--seconds", type=float, required=True)
    arguments.add_argument("--dry", action="store_true")
    given = arguments.parse_args()
    device, dtype = target(given.dry)
    torch.manual_seed(0)
    until, failed, last = time.monotonic() + given.seconds, False, 0.0
    for cell in given.cells.split(","):
        begun = time.monotonic()
        if begun + last > until:
            break
        name, tokens = cell.split(":")
        row: dict[str, Any] = {"arm": given.arm, "shape": name, "tokens": int(tokens)}
        try:
            row |= measured(ARMS[given.arm], SHAPES[name], int(tokens), device, dtype)
        except ModuleNotFoundError as error:
            row["left_out"] = f"not installed: {error.name}"
        except Exception:
            row["error"], failed = traceback.format_exc(), True
        print(json.dumps(row), flush=True)
        last = time.monotonic() - begun
    return int(failed)


def target(dry: bool) -> tuple[torch.device, torch.dtype]:
    """Device and precision of the measurement.

    Raises:
        RuntimeError: there is no GPU, and this is no dry run.
    """
    if dry:
        return torch.device("cpu"), torch.float32
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU; --dry runs on the CPU")
    return torch.device("cuda"), torch.bfloat16


def measured(arm: Arm, shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The figures of one cell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    begun = time.perf_counter()
    batch = batch_of(shape, tokens, device, dtype)
    if arm.build is None:
        found = _bare(shape, tokens, device, dtype, batch)
    else:
        found = _layer(arm, arm.build(shape, device, dtype), shape, tokens, batch, device)
    return found | {"cell_s": round(time.perf_counter() - begun, 1)}


def _bare(shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype, batch: Batch) -> dict[str, Any]:
    works = products(shape, device, dtype, batch)
    times = {name: timed(work, device, SECONDS[device.type]).ms for name, work in works.items()}
    return {
        "ms": times["base"],
        "tflops": shape.base_flops(tokens) / times["base"] / 1e9,
        "thin_ms": times["thin"],
        "outer_ms": times["outer"],
        "all_ms": sum(times.values()),
    }


def _layer(arm: Arm, layer: Layer, shape: Shape, tokens: int, batch: Batch, device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    out = layer.step(batch).detach()
    assert batch.x.grad is not None
    if batch.weights.grad is None or any(tensor.grad is None for tensor in layer.trained):
        raise RuntimeError("a tensor that is trained got no gradient")
    row: dict[str, Any] = {"norm": out.float().norm().item(), "grad_norm": batch.x.grad.float().norm().item()}
    del out
    if device.type == "cuda":
        # The first step may also move or prepare weights, once.
        row["first_bytes"] = torch.cuda.max_memory_allocated(device)
        layer.clear(batch)
        torch.cuda.reset_peak_memory_stats(device)
    timing = timed(lambda: layer.step(batch), device, SECONDS[device.type], before=lambda: layer.clear(batch))
    flops = shape.base_flops(tokens) + (shape.lora_flops(tokens) if arm.lora else 0.0)
    row |= asdict(timing) | {"tflops": flops / timing.ms / 1e9, "weight_bytes": layer.weight_bytes}
    if device.type == "cuda":
        row["total_bytes"] = torch.cuda.max_memory_allocated(device)
        row["peak_bytes"] = row["total_bytes"] - layer.weight_bytes
        row["held_bytes"] = held
    if layer.trained:
        optimizer = torch.optim.AdamW(layer.trained, lr=1e-5, fused=True)
        row["optimizer_ms"] = timed(optimizer.step, device, SECONDS[device.type]).ms
        row["trained_tensors"] = len(layer.trained)
    wait(device)
    return row | {"paths": layer.paths()}


if __name__ == "__main__":
    sys.exit(main())
