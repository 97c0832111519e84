"""A folder that is there whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from hfedmoe.errors import UserError
from hfedmoe.runs.disk import UNFINISHED, disk_errors


def check_free(out: Path) -> None:
    """Raise UserError unless `out` does not exist or is an empty folder."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; choose another folder")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: is not empty; choose another folder")


def writing(out: Path) -> AbstractContextManager[None]:
    """Turn a failed write below `out` into a UserError that names it and the way out."""
    return disk_errors(out, "try again, or choose another folder")


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A scratch folder next to `out`, which becomes `out` when the block ends well, and is deleted otherwise.

    What the block writes into it belongs under `writing(out)`; what it reads does not.

    Raises:
        UserError: `out` is a file or not empty, or cannot be written.
    """
    with disk_errors(out, "choose another folder"):
        check_free(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=out.parent))
    try:
        yield scratch
        with writing(out):
            # Temporary folders are private, and so is what safetensors writes.
            for path in [scratch, *scratch.rglob("*")]:
                path.chmod(0o755 if path.is_dir() else 0o644)
            if out.is_dir():
                out.rmdir()
            scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
