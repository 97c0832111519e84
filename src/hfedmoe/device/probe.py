"""The memory that this process may use and what limits it; the machine's speed, measured in under a second."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hfedmoe.device.cgroups import memory_groups
from hfedmoe.device.rlimits import resource

_PROC = Path("/proc/self")


@dataclass(frozen=True)
class Probe:
    """What a machine offers to this process."""

    memory_bytes: int
    """All that this process may hold, including what it already holds."""
    limit: str
    """What sets this limit: free memory, a control group, a resource limit or the accelerator."""
    flops: float
    """Float32 FLOP/s of a large matrix product: the best case; a training step reaches only a part of it."""
    disk_bytes_per_s: float | None = None
    """Reading speed of the given file."""


def probe(device: str = "cpu", file: Path | None = None) -> Probe:
    """Measure the device (as torch names it), and the reading speed of `file`, a checkpoint for example."""
    memory, limit = available_memory(device)
    return Probe(memory, limit, matmul_flops(device), None if file is None else read_speed(file))


def available_memory(device: str = "cpu") -> tuple[int, str]:
    """Bytes that this process may hold on the device, including what it already holds, and what sets this limit.

    On the CPU: the smallest of free physical memory, the room in the control groups and the resource limits. Cached
    files count as free: the kernel drops them when memory is needed. Swap does not count.
    """
    kind = device.partition(":")[0]
    if kind == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device), f"free memory of {device}"
    limits = [*_physical(), *_groups(), *_resource_limits()]
    if kind == "mps":  # shares the machine's memory
        import torch

        limits.append((torch.mps.recommended_max_memory(), "Metal's recommended working set"))
    return min(limits)


def usable_cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str:
    """What the processor is called, as far as the system says."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def total_memory() -> int:
    """Bytes of memory of the machine, whatever is free of it."""
    import psutil

    return int(psutil.virtual_memory().total)


def _physical() -> list[tuple[int, str]]:
    """Free memory plus this process's own memory."""
    import psutil

    return [(psutil.virtual_memory().available + _own_bytes(), "free physical memory")]


def _own_bytes() -> int:
    """Resident bytes of this process that are not cached files: those already count as free."""
    import psutil

    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def _groups(proc: Path = _PROC) -> list[tuple[int, str]]:
    """The room in each limited control group of this process, its own and those above."""
    found = []
    for group in memory_groups(proc):
        limit = group.limit_bytes
        if limit is not None:
            room = min(limit, limit - group.held_bytes + _own_bytes())
            found.append((max(0, room), f"limit of the control group {group.folder}"))
    return found


def _resource_limits(proc: Path = _PROC) -> list[tuple[int, str]]:
    """RLIMIT_DATA and RLIMIT_AS if they are set, minus address space that is reserved and not used."""
    found: list[tuple[int, str]] = []
    if resource is None:
        return found
    for name, counted in (("RLIMIT_DATA", "VmData"), ("RLIMIT_AS", "VmSize")):
        soft = resource.getrlimit(getattr(resource, name))[0]
        if soft != resource.RLIM_INFINITY:
            status = _status(proc)
            reserved = max(0, status.get(counted, 0) - status.get("VmRSS", 0))
            found.append((max(0, soft - reserved), name))
    return found


def _status(proc: Path) -> dict[str, int]:
    """The memory lines of /proc/PID/status in bytes; empty if there is no such file."""
    try:
        lines = (proc / "status").read_text().splitlines()
    except FileNotFoundError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


_LARGEST = {"cpu": 1024, "cuda": 4096, "mps": 2048}
_RUN_S = 0.02
"""A timed run takes at least about this long, so that the clock and kernel launches do not matter."""


def matmul_flops(device: str = "cpu", budget_s: float = 0.4) -> float:
    """Float32 FLOP/s of square matrix products with torch's current number of threads: the best of some short runs.

    Takes at most about `budget_s` plus warm-up, and 12 MB on a CPU. The best run counts because other work on the
    machine can only slow a run down.
    """
    import torch

    kind = device.partition(":")[0]
    ways: dict[str, Callable[[], None]] = {
        "cuda": partial(torch.cuda.synchronize, device),
        "mps": torch.mps.synchronize,
    }
    synchronise = ways.get(kind, lambda: None)
    rate, size, repeats = 0.0, 128, 1
    end = time.perf_counter() + budget_s
    a = b = out = torch.empty(0)
    while time.perf_counter() < end:
        if out.shape[0] != size:
            a, b = torch.rand(2, size, size, device=device, dtype=torch.float32)
            out = a @ b  # warm-up: threads, kernels
            synchronise()
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b, out=out)
        synchronise()
        seconds = time.perf_counter() - start
        rate = max(rate, repeats * 2 * size**3 / seconds)
        if seconds < _RUN_S and size < _LARGEST.get(kind, 1024):
            size *= 2
        elif seconds < _RUN_S:
            repeats *= 2
    return rate


def read_speed(file: Path, at_most: int = 64 << 20) -> float:
    """Bytes per second of reading the start of `file`, from the disk if the system can drop its cache.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is empty.
    """
    with open(file, "rb", buffering=0) as handle:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle.fileno(), 0, at_most, os.POSIX_FADV_DONTNEED)
        start, total = time.perf_counter(), 0
        while total < at_most and (chunk := handle.read(1 << 20)):
            total += len(chunk)
        seconds = time.perf_counter() - start
    if total == 0:
        raise ValueError(f"{file} is empty: nothing to measure")
    return total / seconds
