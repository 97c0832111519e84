"""Notice that a client ran out of memory or time in a round, and choose how many experts it holds next.

Decision: the number of experts shrinks, never the batch. The client is left out of that round, and the scores that it
computed in it are dropped.
"""

import errno
import gc
import re
from collections.abc import Callable
from typing import TypeVar

import torch

from hfedmoe.client.training import OutOfTimeError
from hfedmoe.wire.trouble import OUT_OF_MEMORY, OUT_OF_TIME, Trouble

MAX_WORDS = 120
_ALLOCATOR = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "alloc_failed",
)
T = TypeVar("T")


def attempt(work: Callable[[], T]) -> T | Trouble:
    """Do the work. If it runs out of memory or time, return a Trouble; any other error is raised.

    When this returns a Trouble, nothing of the failed work is left in memory.
    """
    try:
        return work()
    except OutOfTimeError as error:
        trouble = Trouble(OUT_OF_TIME, str(error), OUT_OF_TIME)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        trouble = Trouble(OUT_OF_MEMORY, _words(error), OUT_OF_MEMORY)
    # Only now: the exception kept the frames of the failed step, with their tensors, alive.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return trouble


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error or one of its causes says that memory ran out."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        # The CPU allocator of torch has no exception of its own.
        if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _ALLOCATOR):
            return True
        error = error.__cause__ or error.__context__
    return False


def smaller(held: int, smallest: int) -> int:
    """Experts to hold after `held` did not fit: a fifth of those above `smallest` go, at least one. 0: none fit."""
    spare = held - smallest
    return held - max(1, -(-spare // 5)) if spare > 0 else 0


def _words(error: BaseException) -> str:
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return re.sub(r"^\[enforce fail[^\]]*\]\s*[^.]*\.\s*", "", line)[:MAX_WORDS].strip()
