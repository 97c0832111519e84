"""A tracker that fails, hangs or ends: one warning, the run goes on, and what is missing is sent later.

The library is a stand-in of a few lines, found before the real one, because the real ones cannot be told to fail.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hfedmoe.errors import UserError
from hfedmoe.report.tracking import sender as sending
from hfedmoe.report.tracking.afterwards import send_record
from hfedmoe.report.tracking.child import clean
from hfedmoe.report.tracking.process import LOG
from hfedmoe.report.tracking.state import NAME
from hfedmoe.report.tracking.tracking import Tracking, tracked
from hfedmoe.runs.folder import RunFolder
from tests.report.tracking.records import Notes, complete, config

STAND_IN = """
import json, os, pathlib, time

here = pathlib.Path(__file__).parent

def trouble(moment):
    path = here / moment
    if not path.exists():
        return
    what = path.read_text()
    if what == "hang":
        time.sleep(3600)
    if what == "end":
        os._exit(3)
    raise ValueError(what)

class Run:
    def __init__(self):
        self._initial_last_step = max((step for step, _ in rounds()), default=None)

    def log(self, figures, step):
        trouble("log")
        with (here / "rounds").open("a") as file:
            file.write(json.dumps([step, figures]) + "\\n")

def rounds():
    path = here / "rounds"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

def init(**settings):
    print("a banner on the output")
    trouble("init")
    return Run()

def finish():
    trouble("finish")
"""
Begun = Callable[..., tuple[Tracking, Notes]]


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the stand-in; a file there says what goes wrong at which moment."""
    folder = tmp_path / "lib" / "trackio"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setenv("PYTHONPATH", str(folder.parent), prepend=":")
    return folder


def rounds_of(library: Path) -> list[int]:
    path = library / "rounds"
    return [json.loads(line)[0] for line in path.read_text().splitlines()] if path.exists() else []


def run_of(tmp_path: Path, *rounds: int, timeout_s: float = 120.0, until: Callable[[], bool] | None = None) -> Notes:
    """A run; before its last round it waits until something is so."""
    notes = Notes()
    settings = config("trackio", f"tracking.timeout_s={timeout_s}")
    with (
        RunFolder.create(tmp_path / "run", settings) as folder,
        tracked(settings, folder, notes, None, 300.0) as tracking,
    ):
        complete(folder, tracking, *rounds[:-1])
        deadline = time.monotonic() + 120
        while until is not None and not until():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        complete(folder, tracking, rounds[-1])
    return notes


@pytest.mark.parametrize("moment", ["init", "log", "finish"])
@pytest.mark.parametrize(("what", "said"), [("no such host", "ValueError: no such host"), ("end", "its process ended")])
def test_a_tracker_that_fails_is_one_warning(tmp_path: Path, library: Path, moment: str, what: str, said: str) -> None:
    (library / moment).write_text(what)
    notes = run_of(tmp_path, 0, 1, 2, 3)
    (warning,) = notes.warnings
    assert warning.startswith(f"tracking: trackio: {said}; the run goes on")
    assert f"hfedmoe track {tmp_path / 'run'}" in warning
    assert rounds_of(library) == ([0, 1, 2, 3] if moment == "finish" else [])


def test_a_tracker_that_hangs_is_given_up_and_ends(tmp_path: Path, library: Path) -> None:
    (library / "log").write_text("hang")
    started = time.monotonic()
    notes = run_of(tmp_path, 0, 1, 2, 3, timeout_s=3.0)
    assert time.monotonic() - started < 120  # the stand-in sleeps for an hour
    (warning,) = notes.warnings
    assert "no answer in 3 s" in warning


def test_a_run_waits_at_its_end_only_for_so_long(tmp_path: Path, library: Path) -> None:
    (library / "log").write_text("hang")
    notes, settings = Notes(), config("trackio", "tracking.timeout_s=600")
    started = time.monotonic()
    with (
        RunFolder.create(tmp_path / "run", settings) as folder,
        tracked(settings, folder, notes, None, 1.0) as tracking,
    ):
        complete(folder, tracking, 0, 1, 2, 3)
        assert time.monotonic() - started < 60  # no round waits for a tracker
    assert not any(sender.is_alive() for sender in tracking.senders)
    assert ["not done within 1 s" in warning for warning in notes.warnings] == [True]


def test_what_failed_is_sent_when_the_tracker_works_again(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "RETRY_S", 0.05)
    (library / "init").write_text("no such host")

    def mended() -> bool:
        if "no such host" in (tmp_path / "run" / LOG).read_text():
            (library / "init").unlink(missing_ok=True)
        return rounds_of(library) == [0, 1, 2]

    notes = run_of(tmp_path, 0, 1, 2, 3, until=mended)
    assert len(notes.warnings) == 1
    assert rounds_of(library) == [0, 1, 2, 3]


def test_the_record_is_sent_after_the_run(tmp_path: Path, library: Path) -> None:
    (library / "log").write_text("no such host")
    run_of(tmp_path, 0, 1, 2, 3)
    settings = RunFolder.open(tmp_path / "run").config
    places: list[str] = []
    with pytest.raises(UserError, match="trackio: ValueError: no such host"):
        send_record(tmp_path / "run", settings, places.append)
    assert rounds_of(library) == []
    (library / "log").unlink()
    for _ in range(2):  # the second time there is nothing left
        send_record(tmp_path / "run", settings, places.append)
        assert rounds_of(library) == [0, 1, 2, 3]
    assert "project hfedmoe" in places[-1]
    with pytest.raises(UserError, match="is empty"):
        send_record(tmp_path / "run", settings.model_copy(update={"tracking": type(settings.tracking)()}), print)


def test_nothing_is_printed_and_the_log_has_it(
    tmp_path: Path, library: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_of(tmp_path, 0, 1)
    assert capfd.readouterr() == ("", "")
    assert "a banner on the output" in (tmp_path / "run" / LOG).read_text()


def test_an_error_in_the_run_is_told_and_not_hidden(tmp_path: Path, library: Path) -> None:
    settings = config("trackio")

    def fail(folder: RunFolder) -> None:
        with tracked(settings, folder, Notes(), None, 300.0) as tracking:
            complete(folder, tracking, 0)
            raise UserError("too few clients")

    with RunFolder.create(tmp_path / "run", settings) as folder, pytest.raises(UserError, match="too few"):
        fail(folder)
    assert json.loads((tmp_path / "run" / NAME).read_text())["trackers"]["trackio"]["status"] == "failed"
    assert rounds_of(library) == [0]


def test_a_damaged_note_of_what_was_sent_is_named(tmp_path: Path, library: Path) -> None:
    run_of(tmp_path, 0, 1)
    (tmp_path / "run" / NAME).write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        send_record(tmp_path / "run", RunFolder.open(tmp_path / "run").config, print)


def test_errors_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    text = clean("401 for\n https://alice:pw@mlflow.lan/api with key 0123456789abcdef" + "x" * 1000)
    assert text.startswith("401 for https://***@mlflow.lan/api with key ***")
    assert len(text) < 400
