"""Where hfedmoe keeps what it can make again: `$XDG_CACHE_HOME/hfedmoe`, usually `~/.cache/hfedmoe`."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where converted models are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "hfedmoe"
