"""Milliseconds of repeated work on a device, by the device's own clock."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

WARM_UP = 5
MOST = 40
FEWEST = 20
SOME = 5
"""Repeats that always run, however slow the work is."""
TOGETHER = 10
"""Repeats between two waits for the device: in training, too, layers are queued one after the other."""


@dataclass
class Timing:
    """Of one repeat."""

    ms: float
    """Median."""
    best_ms: float
    host_ms: float
    """Time in which the host issued the work; about `ms` or more if the host is what limits."""
    repeats: int


def timed(
    work: Callable[[], object], device: torch.device, seconds: float, before: Callable[[], None] = lambda: None
) -> Timing:
    """Time `work`: FEWEST to MOST repeats, fewer only if they take longer than `seconds`.

    Args:
        before: runs before every repeat and is not timed.
    """
    for _ in range(WARM_UP):
        before()
        work()
    wait(device)
    started = time.perf_counter()
    found: list[float] = []
    host: list[float] = []
    while len(found) < MOST:
        spent = time.perf_counter() - started
        if (len(found) >= SOME and spent > seconds) or (len(found) >= FEWEST and spent > seconds / 2):
            break
        some = SOME if spent > seconds / 4 or not found else TOGETHER
        found += _some(work, before, device, some, host)
    return Timing(statistics.median(found), min(found), statistics.median(host), len(found))


def wait(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _some(
    work: Callable[[], object], before: Callable[[], None], device: torch.device, number: int, host: list[float]
) -> list[float]:
    spans = []
    for _ in range(number):
        before()
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
        begun = time.perf_counter()
        work()
        host.append((time.perf_counter() - begun) * 1e3)
        if device.type == "cuda":
            end.record()
            spans.append((begin, end))
    wait(device)
    if device.type == "cuda":
        return [begin.elapsed_time(end) for begin, end in spans]
    return host[-number:]
