"""A process that dies soon after each start is not started for ever."""

import signal
import time
from collections.abc import Callable

QUICK_S, MOST = 60.0, 5
"""A death within so many seconds of the start is a quick one; so many in a row are too many."""


class Deaths:
    """Counts the quick deaths in a row of a process that is started again after each.

    Args:
        clock: in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self._in_row = 0

    def started(self) -> None:
        """The process was started."""
        self._started = self._clock()

    def too_many(self, code: int, worked: bool) -> bool:
        """Note a death with this exit code, and say whether the process is to be given up.

        Args:
            worked: it had come so far as to work. If it is killed then, the memory was full: it works with less after
                the next start, so this does not count.
        """
        if worked and code == -signal.SIGKILL:
            return False
        quick = self._clock() - self._started < QUICK_S
        self._in_row = self._in_row + 1 if quick else 0
        return self._in_row >= MOST
