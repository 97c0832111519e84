"""Nothing is downloaded in tests, and nothing runs on more than one thread: tiny models are slower on two.

Both are said before anything imports the hub's client or torch, and hold for the processes that tests start.
"""

import contextlib
import os
import subprocess

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
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


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB; only root can mount one."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)]
    mounted = False
    with contextlib.suppress(OSError):
        mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("mounting a file system is not allowed here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def pytest_xdist_auto_num_workers() -> int:
    """Half as many again as there are cores: servers and devices wait for each other for most of their time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores + cores // 2


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Every worker gets a share of neighbours, and begins with tests that take long, which would end alone."""
    workers = getattr(config, "workerinput", {"workercount": 1})["workercount"]
    slow = [item for item in items if item.get_closest_marker("slow")]
    rest = [item for item in items if not item.get_closest_marker("slow")]
    files = list(dict.fromkeys(item.path for item in slow))  # the tests of a file may share a cluster
    items.clear()
    for worker in range(workers):
        begin, end = (len(rest) * number // workers for number in (worker, worker + 1))
        items += [item for item in slow if files.index(item.path) % workers == worker] + rest[begin:end]
