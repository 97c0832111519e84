"""Let the C library keep freed memory for the next step instead of giving it back to the system.

A training step frees and takes the same large buffers over and over. By default glibc maps each of them anew, and
every page is faulted in and cleared again: a quarter of a step's time on the CPU was measured.
"""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # the parameters' numbers in <malloc.h>
_LIMIT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Raise glibc's thresholds; returns whether that was possible (Linux with glibc only)."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_THRESHOLD, 1 << 30), (_TRIM_THRESHOLD, _LIMIT), (_TOP_PAD, 1 << 26))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
