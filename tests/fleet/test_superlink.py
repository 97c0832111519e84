"""Flower's own SuperLink, started and looked after."""

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from flwr.proto.control_pb2 import ListNodesRequest, ListRunsRequest
from flwr.supercore.run import RunNotRunningException

from hfedmoe.errors import UserError
from hfedmoe.fleet.folder import opened
from hfedmoe.fleet.front import Board
from hfedmoe.fleet.superlink import SuperLink, superlink
from tests.fleet.places import hfedmoe, new_fleet


def names(link: SuperLink) -> list[str]:
    nodes = link.control.ListNodes(ListNodesRequest()).nodes_info
    return sorted(node.name for node in nodes if not node.HasField("unregistered_at"))


def statuses(link: SuperLink) -> list[str]:
    runs = link.control.ListRuns(ListRunsRequest()).run_dict.values()
    return sorted(f"{run.status.status}:{run.status.sub_status}" for run in runs)


def processes() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if any("flower-superlink" in word for word in child.cmdline())]


def until(holds: Callable[[], bool]) -> None:
    """Wait for what happens in its own time; a busy machine may take long."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_superlink_that_does_not_answer_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_fleet(tmp_path, "north")
    folder = opened(tmp_path / "fleet")
    link = SuperLink(folder)  # never launched
    for call, doing in (
        (lambda: link.register(Board(folder).invited()), "take the roster"),
        (link.stop_old_runs, "end an earlier run"),
        (lambda: link.start_run({"config": "x = 1"}), "start the run"),
    ):
        with pytest.raises(UserError, match=rf"SuperLink did not {doing} \(.*refused.*\); see .*superlink.log"):
            call()

    def ended(_: object) -> None:
        raise RunNotRunningException  # Flower's, and no Exception

    monkeypatch.setattr(link.control, "ListRuns", ended)
    with pytest.raises(UserError, match="SuperLink has ended the run"):
        link.stop_old_runs()
    folder.ca.write_text("no certificate")
    with pytest.raises(UserError, match=r"ca.crt: cannot be read as a certificate"):
        SuperLink(folder)


@pytest.mark.slow
def test_it_knows_the_roster_serves_a_run_and_comes_back_after_a_crash(tmp_path: Path) -> None:
    new_fleet(tmp_path, "north", "south")
    folder = opened(tmp_path / "fleet")
    board = Board(folder)
    looks: list[float] = []
    with superlink(folder, lambda: looks.append(time.monotonic())) as link:
        link.register(board.invited())
        link.register(board.invited())
        assert names(link) == ["north", "south"]
        assert hfedmoe("remove", "north", "--fleet", folder.path) == 0
        link.register(board.invited())
        assert names(link) == ["south"]
        run = link.start_run({"config": "x = 1", "run": "0" * 32})
        with link.serving(run) as grid:
            assert list(grid.get_nodes()) == []  # nobody is connected
            (process,) = processes()
            process.kill()
            process.wait(30)
            assert list(grid.get_nodes()) == []  # asked again until the new process answers
        assert statuses(link) == ["finished:completed"]
        assert names(link) == ["south"]
        link.start_run({"config": "x = 2", "run": "1" * 32})
        link.stop_old_runs()
        assert statuses(link) == ["finished:completed", "finished:stopped"]
        until(lambda: len(looks) > 1)
    assert processes() == []
    assert not link.secret.exists()
