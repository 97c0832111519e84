"""A client with random weights in a process of its own: it trains one round, and says what memory it took.

`benchmarks.gpu_fits` starts it early, because imports take longer than all the rest, and sends one line of JSON when
the GPU is free:

    {"residents": [16, 16, ...], "settings": [...], "limit_bytes": null}
"""

import json
import subprocess
import sys
import time
import traceback
from math import prod
from pathlib import Path
from typing import Any

from benchmarks.gpu_cases import Case


def driver_bytes() -> int | None:
    """Memory of the first GPU that the driver says is used, by all processes; None: there is no nvidia-smi."""
    command = ["nvidia-smi", "-i", "0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (FileNotFoundError, subprocess.SubprocessError) as error:
        print(f"nvidia-smi gives no figure: {error}", file=sys.stderr, flush=True)
        return None
    words = done.stdout.strip()
    return int(words) << 20 if words.isdigit() else None


def serve(case: Case, folder: Path, device: str) -> None:
    """Import everything, wait for the order, do it, and print the result as one line of JSON."""
    import transformers  # noqa: F401

    import benchmarks.random_weights  # noqa: F401
    import hfedmoe.client.app
    import hfedmoe.prepare  # noqa: F401

    order = json.loads(sys.stdin.readline())
    result: dict[str, Any] = {}
    try:
        measure(case, folder, device, order, result)
    except Exception:
        # What was measured until then is worth a report; the caller fails at the end.
        result["error"] = traceback.format_exc()
    print(json.dumps(result))


def measure(case: Case, folder: Path, device_name: str, order: dict[str, Any], result: dict[str, Any]) -> None:
    """Open the client, train, and put the figures into `result` (also if training fails).

    Raises:
        RuntimeError: the client did not train.
    """
    import torch

    from hfedmoe.device.peak import peak_process_bytes

    device = torch.device(device_name)
    on_gpu = device.type == "cuda"
    if on_gpu:
        _begin(order, result)
    try:
        _run(case, folder, device, order, result)
    finally:
        if on_gpu:
            _figures(result)
        else:
            result["process"] = peak_process_bytes()


def _begin(order: dict[str, Any], result: dict[str, Any]) -> None:
    """Make the context and cuBLAS' workspace, and limit torch's allocator to what the context leaves."""
    import torch

    started = time.perf_counter()
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(256, 256, dtype=dtype, device="cuda")
        square @ square
    del square
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    result["workspace"] = torch.cuda.memory_allocated()
    result["context_at_start"] = total - free - torch.cuda.memory_reserved()
    result["context_s"] = time.perf_counter() - started
    if order["limit_bytes"] is not None:
        room = order["limit_bytes"] - result["context_at_start"]
        result["allocator_limit"] = room
        torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)


def _run(case: Case, folder: Path, device: Any, order: dict[str, Any], result: dict[str, Any]) -> None:
    import torch

    from benchmarks.random_weights import open_random
    from hfedmoe.client.app import client_app
    from hfedmoe.client.device import Device
    from hfedmoe.data.tasks import load_watched_task
    from hfedmoe.models.wrapping import wrap
    from hfedmoe.moe.payload import expected_shapes, initial_tensors
    from hfedmoe.prepare import encoder_of
    from hfedmoe.wire.inprocess import InProcessGrid
    from hfedmoe.wire.messages import TRAIN, facts_of, train_request, unpack_bits

    started = time.perf_counter()
    config = case.config(folder, str(device), order["settings"])
    task, _ = load_watched_task(config.data, config.partition, config.seed, 0)
    loaded = open_random(config.model, device)
    model = wrap(loaded.model, config, loaded.store, masked=False)
    result["base"] = _allocated(device)
    resident = [torch.arange(number) < held for number, held in zip(model.num_experts, order["residents"], strict=True)]
    client = Device(
        0, "client", model, encoder_of(loaded, task, config.data), task.train, config, initial_tensors(model)
    )
    model.set_resident(resident)
    result["held"] = _allocated(device)
    result["loading_peak"] = _peak(device)
    result["build_s"] = time.perf_counter() - started
    _forget_peak(device, result)
    shapes = expected_shapes(model, resident)
    request = train_request(1, resident, _small_numbers(shapes))
    peaks: list[int] = []
    result["step_peaks"] = peaks

    def on_step(number: int, step: int, loss: float) -> None:
        peaks.append(_peak(device))
        _forget_peak(device, result)

    client.on_step = on_step
    started = time.perf_counter()
    grid = InProcessGrid(client_app(lambda *_: client), 1)
    (reply,) = grid.send_and_receive([grid.create_message(request, TRAIN, 1, "")])
    result["train_s"] = time.perf_counter() - started
    if reply.has_error():
        raise RuntimeError(reply.error.reason)
    facts = facts_of(reply)
    if "trained" not in facts:
        result["status"], reason = facts["status"], facts["reason"]
        raise RuntimeError(f"it did not train: {result['status']}: {reason!s}")
    result["trained"] = sum(int(bits.sum()) for bits in unpack_bits(facts["trained"], model.num_experts))
    result["losses"] = facts.get("step_losses")


def _small_numbers(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """A tensor of every shape, cut from one row of random numbers: drawing gigabytes would take long."""
    import torch

    numbers = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)) * 0.02
    made = {}
    for name, shape in shapes.items():
        size = prod(shape)
        made[name] = numbers.repeat(-(-size // len(numbers)))[:size].reshape(shape)
    return made


def _allocated(device: Any) -> int:
    import torch

    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def _peak(device: Any) -> int:
    import torch

    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def _forget_peak(device: Any, result: dict[str, Any]) -> None:
    """Begin a new peak of what is allocated; that of what is reserved goes on, in `result`."""
    import torch

    if device.type == "cuda":
        result["reserved"] = max(result.get("reserved", 0), torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()


def _figures(result: dict[str, Any]) -> None:
    """Peaks of the whole process. The allocator gives nothing back by itself, so the driver's last figure is its peak.

    It does give back what it keeps when it meets its limit: `retries` counts that.
    """
    import torch

    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    result["update_peak"] = torch.cuda.max_memory_allocated()
    result["allocated"] = max([result["update_peak"], result.get("loading_peak", 0), *result.get("step_peaks", [])])
    result["reserved"] = max(result.get("reserved", 0), torch.cuda.max_memory_reserved())
    result["device_used"] = total - free
    result["driver_used"] = driver_bytes()
    result["context"] = total - free - torch.cuda.memory_reserved()
    result["retries"] = int(torch.cuda.memory_stats().get("num_alloc_retries", 0))
