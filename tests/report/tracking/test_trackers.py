"""Every tracker with its real library, offline: what was sent is read back from where the library writes it."""

import json
import shutil
import sqlite3
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hfedmoe.report.tracking.sender import Item
from hfedmoe.report.tracking.state import NAME
from hfedmoe.report.tracking.tracking import tracked
from hfedmoe.runs.folder import RunFolder
from hfedmoe.runs.refusals import is_installed
from tests.report.tracking.records import LABEL, Notes, complete, config, contents, loss_of, needs

Series = list[tuple[int, float]]
ALL = [pytest.param(name, marks=needs(name)) for name in ("tensorboard", "wandb", "mlflow", "trackio")]
PROJECT, GROUP, TAG = "ward-notes", "night", "first-try"
WAIT_S = 300.0
WHO = (f"tracking.project={PROJECT}", f"tracking.group={GROUP}", f'tracking.tags=["{TAG}"]')


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """A new store of MLflow, which takes seconds to make; None: MLflow is not installed."""
    if not is_installed("mlflow"):
        return None
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path | None) -> None:
    if empty_store is not None:
        shutil.copy(empty_store, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def of_tensorboard(here: Path) -> dict[str, Series]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(here / "run" / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def records_of_wandb(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: a log of LevelDB after 7 bytes, in blocks of 32 KiB."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # too little for a header: padding
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last part
            yield whole
            whole = b""


def of_wandb(here: Path) -> dict[str, Series]:
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, Series] = {}
    paths = sorted((here / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len({path.name for path in paths}) == 1  # the same run: `wandb sync` puts them together
    for path in paths:
        for record in map(Record.FromString, records_of_wandb(path.read_bytes())):
            values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            for name, value in values.items():
                if not name.startswith("_"):
                    found.setdefault(name, []).append((record.history.step.num, json.loads(value)))
            for item in record.summary.update:  # it has the last of all series, too
                if item.key.startswith("sites/"):
                    found.setdefault(item.key, []).append((3, json.loads(item.value_json)))
    return found


def of_mlflow(here: Path) -> dict[str, Series]:
    found: dict[str, Series] = {}
    with sqlite3.connect(here / "mlflow.db") as store:
        assert store.execute("SELECT name FROM experiments WHERE experiment_id > 0").fetchall() == [(PROJECT,)]
        ((run, name),) = store.execute("SELECT run_uuid, name FROM runs").fetchall()
        assert name == "run"
        tags = dict(store.execute("SELECT key, value FROM tags WHERE run_uuid = ?", (run,)))
        assert (tags["group"], tags["tags"]) == (GROUP, TAG)
        assert store.execute("SELECT value FROM params WHERE key = 'train.steps'").fetchall() == [("2",)]
        for key, step, value in store.execute("SELECT key, step, value FROM metrics ORDER BY step"):
            found.setdefault(key, []).append((step, value))
    return found


def of_trackio(here: Path) -> dict[str, Series]:
    found: dict[str, Series] = {}
    with sqlite3.connect(here / "trackio" / f"{PROJECT}.db") as store:
        for step, metrics in store.execute("SELECT step, metrics FROM metrics ORDER BY id"):
            for name, value in json.loads(metrics).items():
                found.setdefault(name, []).append((step, value))
        assert store.execute("SELECT COUNT(DISTINCT run_name) FROM metrics").fetchone() == (1,)
    return found


READ: dict[str, Callable[[Path], dict[str, Series]]] = {
    "tensorboard": of_tensorboard,
    "wandb": of_wandb,
    "mlflow": of_mlflow,
    "trackio": of_trackio,
}


def begun(here: Path, to: str, *rounds: int) -> Notes:
    """A run with these rounds, interrupted after them."""
    notes = Notes()
    settings = config(to, *WHO)
    with RunFolder.create(here / "run", settings) as folder, tracked(settings, folder, notes, None, WAIT_S) as tracking:
        complete(folder, tracking, *rounds)
    return notes


def continued(here: Path, from_round: int, *rounds: int) -> Notes:
    notes = Notes()
    with RunFolder.open(here / "run", to_write=True) as folder:
        folder.rewind(from_round)
        with tracked(folder.config, folder, notes, from_round, WAIT_S) as tracking:
            complete(folder, tracking, *rounds)
            if 3 in rounds:
                for sender in tracking.senders:
                    sender.put(Item(3, {"sites/gain_mean": 0.125}, gains=True))
    return notes


def edit(here: Path, to: str, **changes: Any) -> None:
    path = here / "run" / NAME
    tree = json.loads(path.read_text())
    tree["trackers"][to] |= changes
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize("to", ALL)
def test_a_run_that_goes_on_is_one_run_with_every_round_once(tmp_path: Path, to: str) -> None:
    first = begun(tmp_path, to, 0, 1)
    second = continued(tmp_path, 1, 2, 3)
    third = continued(tmp_path, 3)  # nothing is left to do
    assert first.warnings + second.warnings + third.warnings == []
    assert len(first.notes) == len(second.notes) == 1
    assert third.notes == []
    series = READ[to](tmp_path)
    assert series["all/loss"] == [(round, loss_of(round)) for round in range(4)]
    assert series["bytes/total"] == [(0, 0), (1, 1100), (2, 2200), (3, 3300)]
    assert series["clients/left_out"] == [(1, 1), (2, 1), (3, 1)]
    assert series["sites/gain_mean"] == [(3, 0.125)]
    state = json.loads((tmp_path / "run" / NAME).read_text())["trackers"][to]
    assert (state["sent"], state["gains"], state["status"]) == (3, True, "finished")


@pytest.mark.parametrize("to", ALL)
def test_labels_and_reasons_stay_and_settings_are_told_once(tmp_path: Path, to: str) -> None:
    begun(tmp_path, to, 0, 1)
    (tmp_path / "run" / "config.toml").unlink()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    written = contents(tmp_path)
    assert LABEL.encode() not in written
    assert b"train.steps" in written


@pytest.mark.parametrize("to", [param for param in ALL if param.values[0] in ("mlflow", "trackio")])
def test_a_tracker_knows_better_than_what_was_noted(tmp_path: Path, to: str, empty_store: Path | None) -> None:
    begun(tmp_path, to, 0, 1)
    edit(tmp_path, to, sent=0)  # as if killed before it was noted that round 1 arrived
    continued(tmp_path, 1, 2)
    assert READ[to](tmp_path)["all/loss"] == [(round, loss_of(round)) for round in range(3)]
    if empty_store is not None:
        shutil.copy(empty_store, tmp_path)
    for path in (tmp_path / "trackio").glob("*.db*"):
        path.unlink()
    continued(tmp_path, 2, 3)  # the store is another one now, and gets all rounds
    assert READ[to](tmp_path)["all/loss"] == [(round, loss_of(round)) for round in range(4)]


@pytest.mark.parametrize("to", [param for param in ALL if param.values[0] != "mlflow"])  # which does as trackio
def test_a_run_that_was_set_back_sends_no_round_twice(tmp_path: Path, to: str) -> None:
    begun(tmp_path, to, 0, 1, 2)
    notes = continued(tmp_path, 0, 1, 2, 3)  # the checkpoints of 1 and 2 were damaged
    assert READ[to](tmp_path)["all/loss"] == [(round, loss_of(round)) for round in range(4)]
    assert any("already" in note for note in notes.notes) == (to != "tensorboard")


@needs("tensorboard")
def test_tensorboard_shows_the_settings_and_compares_runs_by_them(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    begun(tmp_path, "tensorboard", 0)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("settings")
    assert b"| train.steps | 2 |" in text.tensor_proto.string_val[0]
    content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    start = metadata.parse_session_start_info_plugin_data(content)
    assert start.hparams["train.steps"].number_value == 2
    assert start.group_name == GROUP
