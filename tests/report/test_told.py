"""The screen tells the truth simply: one loss, named; which rows decide; peaks as `hfedmoe plan` says them."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from hfedmoe import simulation
from hfedmoe.config import EvaluationConfig
from hfedmoe.data.task import Task
from hfedmoe.device.planner import Planner
from hfedmoe.events import ClientRound, ClientTotals, Evaluation, Participant
from hfedmoe.report.live.lines import Lines
from hfedmoe.report.told import held_out_words, loss_words
from hfedmoe.runs.folder import RunFolder
from hfedmoe.server.keeper import DECIDING
from tests.deployment.nodes import rows_file
from tests.federation import tiny_config

TASK = Task("t", "classification", "{text}", ("a", "b", "c", "d"), [], [])


def shown(out: io.StringIO) -> Lines:
    return Lines(Console(file=out, width=160), lambda: 0.0)


def test_it_is_said_which_rows_are_watched_and_which_decide() -> None:
    settings = EvaluationConfig()
    few, many = (held_out_words(TASK, rows, settings) for rows in (DECIDING - 1, DECIDING))
    assert "49 others are watched after every round, too few to decide anything (that takes 50)" in few
    assert "50 others are watched after every round and decide which checkpoint is best" in many
    assert "no others are watched, so the last checkpoint counts as best" in held_out_words(TASK, 0, settings)
    assert "before, every 2 rounds, and after" in held_out_words(TASK, 0, EvaluationConfig(every=2))


def test_the_loss_has_one_meaning_and_it_is_said() -> None:
    assert f"{math.log(4):.2f} is guessing" in loss_words(TASK, "choices")
    assert "among all words" in loss_words(TASK, "vocabulary")


@pytest.mark.parametrize("loss", ["choices", "vocabulary"])
def test_a_run_shows_and_writes_the_loss_that_it_trains(tmp_path: Path, loss: str) -> None:
    out = io.StringIO()
    config = tiny_config(f"train.loss={loss}", "federation.rounds=1", "clients.budgets=['25%', '100%']")
    folder = simulation.run(config, tmp_path / "run", shown(out))
    text = out.getvalue()
    assert f'(train.loss = "{loss}")' in text
    first, last = RunFolder.open(folder).read_rounds()
    for line in (first, last):
        figures = line["evaluation"]["all"]
        assert line["loss_among"] == loss
        assert line["loss"] == figures["choice_loss" if loss == "choices" else "loss"]
        assert f"loss {line['loss']:.3f}" in text
    if loss == "choices":  # the tiny model begins at random: near the logarithm of its eight labels
        assert first["loss"] == pytest.approx(math.log(8), abs=0.7)
    else:
        assert last["evaluation"]["all"]["choice_loss"] is None
    # A client's loss is the mean over its two steps, and its peak is what `hfedmoe plan` says.
    planner = Planner(config)
    for row in last["clients"]:
        assert row["mean_loss"] == pytest.approx((row["first_loss"] + row["last_loss"]) / 2)
        assert f"loss {row['mean_loss']:.3f}" in text
        assert row["peak_bytes"] == planner.forecast(row["resident"]).highest
        assert not row["peak_is_measured"]


def test_a_column_without_a_value_is_left_out_and_the_time_left_is_known() -> None:
    out, now = io.StringIO(), [0.0]
    live = Lines(Console(file=out, width=160), lambda: now[0])
    live.start("x", 3, 1, [Participant("a", 5, 2, 0.5)])
    for round in (1, 2):
        live.round_started(round)
        live.step(0, 1, 2, 3.0)
        live.step(0, 2, 2, 1.0)
        assert live.rows[0].loss == 2.0  # the mean so far, anew in every round
        now[0] += 10
        live.round_done(round, 10.0, 1, 1)
        assert live.time_left() == 10.0 * (3 - round)
    assert "about 20 s left" in out.getvalue()
    predicted = ClientTotals("a", 1, 2, 2, 4, predicted_bytes=2**20)
    live.final_table([predicted], None, None)
    table = out.getvalue().splitlines()
    heading = next(line for line in table if "peak (predicted)" in line)
    assert heading.count("peak") == 1
    assert "deadline" not in heading
    live.final_table([predicted, replace(predicted, name="b", predicted_bytes=None, measured_bytes=5)], None, None)
    assert any(line.count("peak") == 2 for line in out.getvalue().splitlines())


def test_an_evaluation_tells_the_loss_that_was_trained() -> None:
    assert Evaluation(1, 0.5, 0.4, 9.0, 10).trained_loss == 9.0
    assert Evaluation(1, 0.5, 0.4, 9.0, 10, choice_loss=1.2).trained_loss == 1.2
    assert ClientRound.from_json(ClientRound(mean_loss=1.5).to_json()).mean_loss == 1.5


def test_the_config_of_a_run_holds_no_source_or_scheme_that_was_not_used(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        rows_file(tmp_path / f"{name}.csv", "earn", "acq", rows=20)
        files.append(str(tmp_path / f"{name}.csv"))
    own = (f"data.clients={json.dumps(files)}", "clients.count=2", "partition.min_rows=1", "federation.rounds=1")
    folder = simulation.run(tiny_config(*own), tmp_path / "run", shown(io.StringIO()))
    text = (folder / "config.toml").read_text()
    for key in ("source =", "scheme =", "alpha = 1.0", "shards_per_client ="):
        assert key not in text
    assert simulation.resume(folder, shown(io.StringIO())) == folder
    with RunFolder.create(tmp_path / "iid", tiny_config("partition.scheme=iid")) as run:
        text = (run.path / "config.toml").read_text()
    assert 'scheme = "iid"' in text
    assert "source =" in text
    assert "shards_per_client" not in text
    assert "alpha = 1.0" not in text
