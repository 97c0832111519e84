"""Write a whole folder atomically."""

import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from hfedmoe.errors import UserError
from hfedmoe.files.disk import UNFINISHED, disk_errors
from hfedmoe.files.locks import HeldError, claim

OTHER = "choose another folder"
ENDINGS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that ask a process to end."""


def check_free(out: Path) -> None:
    """Raise UserError unless `out` does not exist or is an empty folder; leftovers of killed writers are ignored."""
    with disk_errors(out, OTHER):
        if out.exists() and not out.is_dir():
            raise UserError(f"{out}: is a file; {OTHER}")
        place = Path(os.path.realpath(out))
        if out.is_dir() and not all(_is_scratch(path, place) for path in out.iterdir()):
            raise UserError(f"{out}: is not empty; {OTHER}")


def writing(out: Path) -> AbstractContextManager[None]:
    """Turn a failed write below `out` into a UserError that names `out` and the way out."""
    return disk_errors(out, f"try again, or {OTHER}")


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes `out` if the block succeeds, and is deleted otherwise.

    It is next to `out`. If `out` exists, it is inside, and its entries are moved to `out`, which may be a mount point
    or a current directory. The next writer to `out` deletes the scratch folder of a killed process.

    Use `writing(out)` for the block's writes into the folder, but not for its reads.

    Raises:
        UserError: `out` is a file or not empty, or cannot be written.
    """
    check_free(out)
    place = Path(os.path.realpath(out))
    with disk_errors(out, OTHER):
        parent = place if place.is_dir() else place.parent
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent, place)
    with _asked_to_end():
        with disk_errors(out, OTHER):
            scratch = Path(tempfile.mkdtemp(prefix=_prefix(place), dir=parent))
        held = _opened(scratch)
        try:
            if held is not None:
                with suppress(OSError):  # a file system without locks: no other process will delete it
                    claim(held)
            yield scratch
            with writing(out):
                _open_to_others(scratch)
                if parent != place:
                    scratch.rename(place)
                else:
                    check_free(out)
                    for entry in list(scratch.iterdir()):
                        entry.rename(place / entry.name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            if held is not None:
                os.close(held)


def _prefix(place: Path) -> str:
    return f".{place.name[:100]}{UNFINISHED}"


def _is_scratch(path: Path, place: Path) -> bool:
    """Whether a folder has the name of a scratch folder for `place`."""
    named = re.fullmatch(re.escape(_prefix(place)) + r"[a-z0-9_]{8}", path.name)
    return named is not None and path.is_dir() and not path.is_symlink()


def _remove_abandoned(parent: Path, place: Path) -> None:
    """Delete the scratch folders for `place` that no process has locked."""
    for path in list(parent.iterdir()):
        if not _is_scratch(path, place):
            continue
        with suppress(OSError, HeldError):  # another process was faster, or holds the lock
            held = _opened(path)
            if held is None:
                continue
            try:
                claim(held)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(held)


def _opened(folder: Path) -> int | None:
    """The descriptor of a folder, for `claim`; None on Windows, where folders cannot be opened."""
    return None if os.name == "nt" else os.open(folder, os.O_RDONLY)


def _open_to_others(scratch: Path) -> None:
    """Set the permissions of the user's umask: temporary folders and safetensors files are private at first."""
    umask = os.umask(0o077)
    os.umask(umask)
    for path in [scratch, *scratch.rglob("*")]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


@contextmanager
def _asked_to_end() -> Iterator[None]:
    """Turn signals that end the process into KeyboardInterrupt, so that unfinished files are deleted."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()  # other threads get no signals
    unanswered = [number for number in ENDINGS if main and signal.getsignal(number) is signal.SIG_DFL]
    for number in unanswered:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in unanswered:
            signal.signal(number, signal.SIG_DFL)
