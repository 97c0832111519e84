"""Whole runs that are tracked: interrupted and resumed, refused, compared."""

import json
from pathlib import Path

import pytest

from hfedmoe.compare.cells import Cell
from hfedmoe.config import TrackingConfig, config_from_text
from hfedmoe.data.terms import terms_of
from hfedmoe.errors import UserError
from hfedmoe.fleet.offer import offer_of
from hfedmoe.prepare import prepare
from hfedmoe.runs import refusals
from hfedmoe.runs.folder import RunFolder
from hfedmoe.simulation import resume, run
from tests.federation import tiny_config
from tests.fleet.places import hfedmoe
from tests.report.tracking.records import Notes, needs, tensorboard_series


class Interrupted(Notes):
    """Ctrl-C in round 2."""

    def client_started(self, round: int, client: int, steps: int) -> None:
        if round == 2:
            raise KeyboardInterrupt


@needs("tensorboard")
def test_a_run_that_is_interrupted_and_resumed_has_every_round_once(tmp_path: Path) -> None:
    settings = tiny_config(
        'tracking.to=["tensorboard"]',
        "tracking.clients=true",
        "evaluation.own_share=0.2",
        "evaluation.every=1",
        "data.train_rows=400",
    )
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "run", Interrupted())
    assert json.loads((tmp_path / "run" / "tracking.json").read_text())["trackers"]["tensorboard"]["sent"] <= 1
    resume(tmp_path / "run", Notes())
    lines = RunFolder.open(tmp_path / "run").read_rounds()

    def series(tag: str) -> list[tuple[int, float]]:
        return [(round, pytest.approx(value)) for round, value in tensorboard_series(tmp_path / "run", tag)]

    assert series("all/loss") == [(line["round"], line["evaluation"]["all"]["loss"]) for line in lines]
    assert series("bytes/up") == [(line["round"], line["bytes_up"]) for line in lines[1:]]
    assert series("client/2/loss") == [(line["round"], line["clients"][2]["mean_loss"]) for line in lines[1:]]
    first = lines[-1]["sites"][0]
    assert series(f"client/{first['client']}/gain") == [(2, first["gain"])]


def test_a_missing_library_is_named_before_anything_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(refusals, "is_installed", lambda name: name != "wandb")
    out = tmp_path / "run"
    assert hfedmoe("run", "tiny", "--out", str(out), "--set", 'tracking.to=["tensorboard", "wandb"]') == 2
    expected = "error: tracking.to: wandb is not installed; pip install 'hfedmoe[wandb]'\n"
    assert capsys.readouterr().err == expected
    assert not out.exists()


def test_a_folder_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trackers_write_such_folders").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not refusals.is_installed("trackers_write_such_folders")
    assert refusals.is_installed("numpy")


def test_addresses_with_passwords_are_refused_and_not_repeated() -> None:
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD") as refused:
        tiny_config("tracking.mlflow_uri=https://alice:hunter2@mlflow.lan")
    assert "hunter2" not in str(refused.value)
    with pytest.raises(UserError, match="tensorbored"):
        tiny_config('tracking.to=["tensorbored"]')


def test_devices_are_not_told_where_the_server_sends_its_figures() -> None:
    ready = prepare(tiny_config('tracking.to=["mlflow"]', "tracking.mlflow_uri=http://mlflow.ward.lan"), Notes())
    terms = terms_of(ready.task, ready.config.data, ready.encoder.first_token_only)
    offered = config_from_text(offer_of(ready, terms, "a run").config, "the offer")
    assert offered.tracking == TrackingConfig()
    assert offered.train == ready.config.train


def test_tracking_changes_no_cell_of_a_comparison() -> None:
    plain, shown = tiny_config(), tiny_config('tracking.to=["tensorboard"]', "tracking.project=ward")
    assert Cell("hfedmoe", 0, plain).digest == Cell("hfedmoe", 0, shown).digest
