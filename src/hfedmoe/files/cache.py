"""The folder for files that can be made again: `$XDG_CACHE_HOME/hfedmoe`, usually `~/.cache/hfedmoe`."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder for converted models and digests."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "hfedmoe"
