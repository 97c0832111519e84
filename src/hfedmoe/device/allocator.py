"""What the C library and torch do with freed memory: keep it for the next step, or give it back at once.

A training step frees and allocates the same large buffers many times. By default glibc maps each of them again, and
every page is faulted in and cleared again: this took a quarter of a step's time on the CPU. But kept memory becomes
fragmented, so a process takes more than it uses. With a budget, freed memory is therefore given back. On a CUDA card
torch keeps what it has freed in pieces of fixed sizes; with a budget it uses pieces that grow, so that less is lost.
"""

import ctypes
import os
import sys

_CUDA_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Variables that torch reads before it uses a card for the first time; the second is the old name of the first."""

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # the parameters' numbers in <malloc.h>
_LIMIT = 2**31 - 1


def keep_freed_memory() -> bool:
    """For speed: raise glibc's thresholds; returns whether that was possible (Linux with glibc only)."""
    return _set({_MMAP_THRESHOLD: 1 << 30, _TRIM_THRESHOLD: _LIMIT, _TOP_PAD: 1 << 26})


def give_back_freed_memory() -> bool:
    """For a budget: every buffer of 1 MiB or more has its own pages; returns whether that was possible.

    By default glibc raises the threshold to the largest buffer that was ever freed, up to 32 MiB. pyarrow's own
    allocator, which reserves a gigabyte at once, is replaced by the system's.
    """
    import pyarrow

    if not any(name in os.environ for name in _CUDA_SETTINGS):
        os.environ[_CUDA_SETTINGS[1]] = "expandable_segments:True"  # a name that every torch since 2.0 reads
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    return _set({_MMAP_THRESHOLD: 1 << 20, _TRIM_THRESHOLD: 1 << 20, _TOP_PAD: 1 << 17})


def trim() -> None:
    """Give back memory that is free now; reading data and building a model leave many small free pieces."""
    if sys.platform.startswith("linux"):
        release = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if release is not None:
            release(0)


def _set(settings: dict[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(parameter, value) == 1 for parameter, value in settings.items())
