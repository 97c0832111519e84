"""A device that has joined looks after its worker, but not for ever."""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hfedmoe.fleet import joining
from hfedmoe.fleet.deaths import MOST, QUICK_S, Deaths
from hfedmoe.fleet.device import AGAIN
from tests.fleet.places import hfedmoe, new_fleet


def test_only_quick_deaths_in_a_row_count() -> None:
    now = [0.0]
    deaths = Deaths(lambda: now[0])

    def died(after_s: float, code: int = 1, worked: bool = False) -> bool:
        deaths.started()
        now[0] += after_s
        return deaths.too_many(code, worked)

    assert [died(3.0) for _ in range(MOST)] == [False] * (MOST - 1) + [True]
    assert not died(QUICK_S)
    assert [died(3.0) for _ in range(MOST - 1)] == [False] * (MOST - 1)
    assert not any(died(3.0, -signal.SIGKILL, worked=True) for _ in range(MOST))  # it comes back smaller
    assert died(3.0, -signal.SIGKILL)


@pytest.mark.parametrize(("code", "starts"), [(1, MOST), (AGAIN, 3 * MOST)])
def test_a_worker_that_dies_at_every_start_is_given_up(
    code: int, starts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    new_fleet(tmp_path, "north")
    (tmp_path / "own.csv").write_text("text,label\n")
    started: list[Any] = []

    def start(*_: Any) -> Any:
        if len(started) == 3 * MOST:
            raise joining.LeaveError
        started.append(SimpleNamespace(stdout=[], poll=lambda: code, terminate=None))
        return started[-1]

    monkeypatch.setattr(joining, "ask", lambda *_: SimpleNamespace(purpose=joining.TO_RUN, run="a"))
    monkeypatch.setattr(joining, "start", start)
    monkeypatch.setattr(joining.time, "sleep", lambda _: None)
    capsys.readouterr()
    ended = hfedmoe("join", tmp_path / "north.invite", "--data", tmp_path / "own.csv")
    assert len(started) == starts
    errors = capsys.readouterr().err.splitlines()
    if code == AGAIN:  # the server is away: it may come back
        assert (ended, errors) == (0, [])
        return
    assert ended == 2
    (error,) = errors
    log = tmp_path / "north.device" / "join.log"
    assert error == f"error: the worker ended soon after each of its last {MOST} starts (code 1); {log} says why"
    assert log.is_file()
