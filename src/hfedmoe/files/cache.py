"""The folder for files that can be made again: `$XDG_CACHE_HOME/hfedmoe`, usually `~/.cache/hfedmoe`.

And that for a device's own results, which cannot: `$XDG_DATA_HOME/hfedmoe`, usually `~/.local/share/hfedmoe`.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from hfedmoe.files.disk import disk_errors


def cache_folder() -> Path:
    """The folder for converted models and digests."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "hfedmoe"


def data_folder() -> Path:
    """The folder for what a device of plain Flower keeps for itself."""
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "hfedmoe"


def is_made(folder: Path) -> bool:
    """Whether the cache has a model's folder: it is written whole or not at all."""
    return (folder / "config.json").is_file()


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A model's folder in the cache, which is made if it does not exist yet.

    Args:
        make: writes the model into a scratch folder, which is renamed then.

    Raises:
        UserError: the cache cannot be written.
    """
    if is_made(folder):
        return folder
    with disk_errors(folder.parent, "try again, or set XDG_CACHE_HOME to another folder"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
        try:
            make(scratch)
            try:
                scratch.rename(folder)
            except OSError:
                if not is_made(folder):  # unless another process was faster
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder
