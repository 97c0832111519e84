"""Locks on open files, on Unix and Windows. They end when the file is closed or the process dies."""

import errno
from typing import Any

fcntl: Any
msvcrt: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:
    msvcrt = None

HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK}


class HeldError(Exception):
    """Another process holds the lock."""


def claim(file: int) -> None:
    """Lock an open file, given by its descriptor, for this process.

    Raises:
        HeldError: another process holds the lock.
        OSError: the system or the file system has no locks.
    """
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt is not None:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            raise OSError(errno.ENOTSUP, "this system has none")
    except OSError as error:
        if error.errno in HELD:
            raise HeldError from None
        raise
