"""Atomic writes of files, by one process at a time, with errors that name the way out."""

import errno
import logging
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

from hfedmoe.errors import DiskError, UserError
from hfedmoe.files.locks import HeldError, claim

logger = logging.getLogger(__name__)

# EFBIG: over a file size limit (`ulimit -f`), which is reported like a full disk.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
SERVED = "fleet.json"
"""In the folder of a run of `hfedmoe serve`: the key under which devices remember the run."""
UNFINISHED = ".tmp-"  # prefix of files that are being written or deleted; they are never read


@contextmanager
def disk_errors(path: Path, then: str) -> Iterator[None]:
    """Turn a failed write at or below `path` into a DiskError with the path, the reason and what to do `then`."""
    try:
        yield
    except OSError as error:
        raise _explain(path, error.errno, error.strerror or str(error), then) from None
    except Exception as error:
        # safetensors is written in Rust and reports a failed write only as text: "... (os error 28)".
        code = re.search(r"\(os error (\d+)\)", str(error))
        if type(error).__name__ != "SafetensorError" or not code:
            raise
        raise _explain(path, int(code[1]), os.strerror(int(code[1])), then) from None


def _explain(path: Path, code: int | None, reason: str, then: str) -> DiskError:
    if code in FULL:
        return DiskError(f"{path}: cannot be written ({reason}); free some space, then {then}")
    return DiskError(f"{path}: cannot be written ({reason}); make it writable, then {then}")


def resume_hint(run: Path) -> str:
    """The command to use after a failed write in a run folder; a run with devices is continued with them only."""
    command = "serve --resume" if (run / SERVED).is_file() else "resume"
    return f"`hfedmoe {command} {shlex.quote(str(run))}`"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` if the block succeeds, and is deleted otherwise."""
    unfinished = path.with_name(UNFINISHED + path.name)
    try:
        with unfinished.open("wb") as file:
            yield file
            sync(file)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync(file: IO[bytes]) -> None:
    """Flush written data to the disk, not only to the system's cache."""
    file.flush()
    os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """`sync` for a file that is already closed."""
    with path.open("rb+") as file:
        sync(file)


def sync_folder(path: Path) -> None:
    """Make new files and renames in a folder survive a power failure."""
    if os.name == "nt":  # folders cannot be opened there; it is not needed
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(folder)


def discard(folder: Path) -> None:
    """Delete a folder atomically: it is renamed first, so nobody sees half of it under its own name."""
    doomed = folder.with_name(f"{UNFINISHED}old-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def lock(run: Path, then: str) -> IO[bytes]:
    """Lock a run for this process; the lock ends when the returned file is closed or the process dies.

    Raises:
        UserError: another process is working on this run, or the folder cannot be written.
    """
    with disk_errors(run, then):
        file = (run / ".lock").open("ab")
    try:
        claim(file.fileno())
    except HeldError:
        file.close()
        raise UserError(f"{run}: another process is working on this run; wait for it or stop it first") from None
    except OSError as error:
        logger.warning("%s: file locks do not work here (%s); start only one process on this run", run, error)
    return file


def require_room(folder: Path, size: int) -> None:
    """Raise UserError if the disk of a folder has less than `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"{folder}: checkpoints need {size / 2**20:.0f} MiB, but only {free / 2**20:.0f} MiB are free; free "
            "some space, or choose another --out"
        )
