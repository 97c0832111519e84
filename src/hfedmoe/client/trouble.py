"""A client that runs out of memory or time in a round: how that is noticed, told to the server, and learned from.

Decision: what shrinks is the number of experts, never the batch. The client takes no part in that round, and what it
had learned of its experts in it is dropped.
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
    """Do the work of a round; running out of memory or time is a result, any other error is raised.

    When this returns a Trouble, nothing of the failed work is in memory any more.
    """
    try:
        return work()
    except OutOfTimeError as error:
        trouble = Trouble(OUT_OF_TIME, str(error), OUT_OF_TIME)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        trouble = Trouble(OUT_OF_MEMORY, _words(error), OUT_OF_MEMORY)
    # Only here, with the exception gone, are the frames of the failed step and their tensors free to go.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return trouble


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that there was no memory left."""
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
    """Experts to hold after `held` were too many: less a fifth of those above `smallest`, at least one; 0: none."""
    spare = held - smallest
    return held - max(1, -(-spare // 5)) if spare > 0 else 0


def _words(error: BaseException) -> str:
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return re.sub(r"^\[enforce fail[^\]]*\]\s*[^.]*\.\s*", "", line)[:MAX_WORDS].strip()
