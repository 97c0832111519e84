"""A folder that is there whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hfedmoe.errors import UserError
from hfedmoe.runs.disk import UNFINISHED, disk_errors


def check_free(out: Path) -> None:
    """Raise UserError unless `out` does not exist or is an empty folder."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; choose another folder")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: is not empty; choose another folder")


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A scratch folder next to `out`, which becomes `out` when the block ends well, and is deleted otherwise.

    Raises:
        UserError: `out` is a file or not empty, or cannot be written.
    """
    with disk_errors(out, "choose another folder"):
        check_free(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=out.parent))
    try:
        with disk_errors(out, "try again, or choose another folder"):
            yield scratch
            for path in [
                scratch,
                *scratch.rglob("*"),
            ]:  # temporary folders are private, and so is what safetensors writes
                path.chmod(0o755 if path.is_dir() else 0o644)
            if out.is_dir():
                out.rmdir()
            scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
