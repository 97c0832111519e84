"""Nothing is downloaded in tests, and nothing runs on more than one thread: tiny models are slower on two.

Both are said before anything imports the hub's client or torch, and hold for the processes that tests start.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from hfedmoe.events import Watcher
    from tests.federation import Federation


@pytest.fixture
def federation(tmp_path: Path) -> "Callable[..., Federation]":
    """Makes a tiny federation with overrides; its run folder is `tmp_path / "run"`."""
    from hfedmoe.runs.folder import RunFolder
    from tests.federation import Federation, tiny_config

    def make(*overrides: str, watcher: "Watcher | None" = None) -> Federation:
        config = tiny_config(*overrides)
        return Federation(RunFolder.create(tmp_path / "run", config), config, watcher)

    return make


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with tests that take long, on both of two workers: at the end they would run alone."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    rest = [item for item in items if not item.get_closest_marker("slow")]
    half = len(rest) // 2
    items[:] = [*slow[::2], *rest[:half], *slow[1::2], *rest[half:]]
