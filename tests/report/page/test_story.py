"""What a page reads from the folder of a run."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hfedmoe.config import RunConfig
from hfedmoe.data.example import Example
from hfedmoe.data.task import Task
from hfedmoe.errors import UserError
from hfedmoe.events import Participant
from hfedmoe.prepare import Prepared
from hfedmoe.report.page.learned import confusion, curves, examples
from hfedmoe.report.page.plots import heat
from hfedmoe.report.page.story import Client, read_story
from hfedmoe.report.page.tables import Cell
from hfedmoe.report.page.who import alarms, client_table, expert_plots, split_plot
from hfedmoe.runs import about
from hfedmoe.runs.about import About
from hfedmoe.runs.folder import RunFolder
from hfedmoe.server.intervals import share_interval
from hfedmoe.server.keeper import Keeper
from tests.report.page.runs import LABELS, figures, small_run


def test_rounds_add_up(tmp_path: Path) -> None:
    story = read_story(small_run(tmp_path / "run"))
    assert [(point.round, point.bytes, point.seconds) for point in story.points] == [
        (0, 0, 0),
        (1, 3000, 60),
        (2, 6000, 120),
    ]
    assert [point.round for point in story.whole] == [0, 2]
    assert story.short == [2]
    assert story.failed == []


def test_clients_add_up_and_say_why_they_were_left_out(tmp_path: Path) -> None:
    path = small_run(tmp_path / "run")
    shown = client_table(read_story(path).clients)
    north, south = ({head.text: cell.text for head, cell in zip(shown.heads, row, strict=True)} for row in shown.rows)
    assert list(north.values()) == [
        *("north.csv", "10", "4 (80 %)", "2", "3/5", "2", "2.0 KiB", "1000 B", "2.0 KiB", "3.0 s"),
        *("2.000", "3.000", ""),  # of each round, the mean over its steps
    ]
    assert (south["client"], south["rounds"], south["budget"]) == ("south.csv", "1", "–")
    assert south["left out, and why"] == "late: no answer (1)"


def test_a_column_without_values_is_left_out() -> None:
    shown = client_table([Client(0, "north.csv", 10)])  # never took part: no budget, no experts, no losses
    assert [head.text for head in shown.heads] == ["client", "rows", "rounds", "received", "sent"]
    assert client_table([Client(0, "x", left_out=Counter({"late": 2}))]).rows[0][-1] == Cell("late (2)", 2, "text")


def test_devices_are_known_by_what_they_told_last(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", RunConfig()) as folder:
        folder.describe(About({}, LABELS))  # their rows are elsewhere
        keeper = Keeper(folder)
        keeper.introduce({7: Participant("phone", 12, 4, 0.5)})
        keeper.introduce({7: Participant("phone", 12, 3, 0.375)})
    (phone,) = read_story(tmp_path / "run").clients
    assert (phone.number, phone.name, phone.rows, phone.budget) == (7, "phone", 12, 3)
    (tmp_path / "run" / "about.json").write_text('{"parts": [{"client": 7, "name": "phone", "rows": 12}]}')
    assert read_story(tmp_path / "run").clients[0].budget is None  # as earlier versions wrote it


def test_experts_hand_worked(tmp_path: Path) -> None:
    experts = read_story(small_run(tmp_path / "run")).experts
    assert experts is not None
    np.testing.assert_allclose(experts.usage[0], [[0.25, 0.25, 0.5], [0.5, 0.5, np.nan]])
    np.testing.assert_allclose(experts.held[0], [[0.5, 0.5, 0.5], [1, 1, np.nan]])
    np.testing.assert_allclose(experts.trained[0], [[0.5, 0.5, 0.5], [1, 0, np.nan]])
    # both are half of layer 0's routing away from the mean, and not at all in layer 1: 1/4 in the mean of the layers
    np.testing.assert_allclose(experts.apart, [0.25, 0.0])
    # layer 0 goes from (1/4, 1/4, 1/2) to (1/2, 1/2, 0): 1/2; layer 1 stays
    np.testing.assert_allclose(experts.moved, [0.25])
    assert experts.never.tolist() == [1, 1]
    np.testing.assert_allclose(experts.effective[0], [np.exp(1.5 * np.log(2)), 2.0], rtol=1e-6)
    assert alarms(experts) == ["1 of 5 experts were trained by nobody: they are as in the base model."]


def test_a_collapsed_layer_is_named_also_if_it_began_so(tmp_path: Path) -> None:
    experts = read_story(small_run(tmp_path / "run")).experts
    assert experts is not None
    experts.usage, experts.trained = (np.ones((2, 1, 8), np.float32) for _ in range(2))

    def told(first: list[float], last: list[float]) -> list[str]:
        experts.usage[:, 0] = np.array([first + [0.0] * (8 - len(first)), last + [0.0] * (8 - len(last))])
        return alarms(experts)

    assert told([1] * 8, [1, 1]) == []  # 2 of 8 are a quarter
    assert told([1] * 8, [1]) == [
        "Layer 0 has collapsed: it really uses 1.0 of 8 experts; in the first round it used 8.0."
    ]
    began = "Layer 0 has collapsed: it really uses 1.0 of 8 experts; it was so in the first round already."
    assert told([1], [1]) == [began]
    assert told([1], [1] * 8) == []
    experts.usage = np.array([[[1, 1, 1]], [[1, 0, 0]]], np.float32)  # a quarter of 3 is less than one
    experts.trained = np.ones((2, 1, 3), np.float32)
    assert alarms(experts) == [
        "Layer 0 has collapsed: it really uses 1.0 of 3 experts; in the first round it used 3.0."
    ]
    experts.usage, experts.trained = np.ones((2, 1, 1), np.float32), np.ones((2, 1, 1), np.float32)
    assert alarms(experts) == []


def test_overlap_of_clients(tmp_path: Path) -> None:
    path = small_run(tmp_path / "run")
    experts = read_story(path).experts
    assert experts is not None
    experts.clients, experts.last_held = [0, 1], np.array([[1, 1, 0, 1], [0, 0, 1, 1]], bool)
    plot = expert_plots(experts, {0: "north.csv", 1: "south.csv"})[-1]
    assert plot.columns["share"] == ["1", "0.25", "0.25", "1"]  # one of four that either held
    assert plot.columns["client"][:2] == ["north.csv", "south.csv"]


def test_answers_hand_worked(tmp_path: Path) -> None:
    story = read_story(small_run(tmp_path / "run"))
    before, after = confusion(story)
    # of two "acq", both were called "earn" before; at the end both are right
    assert dict(
        zip(
            zip(before.columns["right"], before.columns["answered"], strict=True),
            before.columns["share of the row"],
            strict=True,
        )
    ) == {("acq", "acq"): "0", ("acq", "earn"): "1", ("earn", "acq"): "0.5", ("earn", "earn"): "0.5"}
    assert after.columns["share of the row"][:2] == ["1", "0"]
    shown = examples(story)
    assert [row["text"] for row in shown] == ["alpha <b>", "delta", "beta", "gamma"]  # changed answers first
    assert (shown[0]["before"], shown[0]["after"], shown[0]["was"], shown[0]["is"]) == ("earn", "acq", False, True)


def test_split_and_curves(tmp_path: Path) -> None:
    story = read_story(small_run(tmp_path / "run"))
    split = split_plot(story)
    assert split is not None
    assert split.columns["share of its rows"] == ["0.9", "0.1", "0", "1"]
    story.about.parts = []  # on real machines only the devices know
    assert split_plot(story) is None
    by_title = {plot.title: plot for plot in curves([story], ["run"])}
    assert list(by_title) == ["Accuracy", "Macro-F1", "Loss on the right answers"]
    accuracy = dict(by_title["Accuracy"].columns)
    low, high = accuracy.pop("from"), accuracy.pop("to")
    assert list(accuracy) == ["line", "round", "MB sent, both ways, all clients", "minutes of all rounds", "accuracy"]
    assert list(zip(*accuracy.values(), strict=True)) == [
        ("all held-out rows", 0, 0.0, 0, 0.25),
        ("all held-out rows", 2, 0.006, 2, 0.75),
        ("watched rows", 1, 0.003, 1, 0.5),
        ("watched rows", 2, 0.006, 2, 0.5),
    ]
    assert (low[0], high[0]) == share_interval(1, 4)
    assert [story.points[2].interval(kind) for kind in ("all", "watch")] == [share_interval(3, 4), share_interval(2, 4)]
    # the same values over all three axes, and no band where it is not known
    for title, over in (("Macro-F1", "macro-F1"), ("Loss on the right answers", "loss on the right answers")):
        assert [*list(accuracy)[:-1], over] == list(by_title[title].columns)


def test_the_loss_is_the_one_that_was_trained(tmp_path: Path) -> None:
    path = small_run(tmp_path / "run")
    with RunFolder.open(path, to_write=True) as folder:
        folder.append_round(
            {"round": 3, "clients": [], "evaluation": {"all": figures(0.5, 9.0) | {"choice_loss": 0.5}}}
        )
    (loss,) = (plot for plot in curves([read_story(path)], ["run"]) if plot.title.startswith("Loss"))
    assert loss.columns["loss on the right answers"] == [3.0, 1.0, 0.5, 1.0, 1.0]


def test_examples_of_multiple_choice_show_the_choices_of_their_row(tmp_path: Path) -> None:
    path = small_run(tmp_path / "run")
    known = about.read(path)
    known.labels, known.choices = [], [["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"]]
    about.write(path, known)
    shown = examples(read_story(path))
    assert [(row["right"], row["before"], row["after"]) for row in shown[:2]] == [("a", "b", "a"), ("g", "h", "g")]


def test_a_run_writes_down_the_choices_of_rows_that_have_their_own() -> None:
    rows = [Example("which?", ("x" * 500, "y"), 1)]
    model: Any = SimpleNamespace(device="cpu")
    encoder: Any = None
    task = Task("quiz", "choices", "{text}", (), rows, rows)
    known = Prepared(RunConfig(), model, encoder, task, []).about(None)
    assert known.choices == [["x" * 399 + "…", "y"]]
    assert known.truth == [1]
    assert known.machine["memory_bytes"] > 0
    labelled = Task("topics", "classification", "{text}", ("x", "y"), rows, rows)
    assert Prepared(RunConfig(), model, encoder, labelled, []).about(None).choices == []


def test_runs_of_earlier_versions_and_damaged_ones(tmp_path: Path) -> None:
    path = small_run(tmp_path / "run")
    (path / "about.json").unlink()
    story = read_story(path)
    assert [client.name for client in story.clients] == ["client 0", "client 1"]
    assert confusion(story) == []
    assert examples(story) == []
    (path / "about.json").write_text('{"parts": 3}')
    with pytest.raises(UserError, match=r"about\.json: is damaged"):
        read_story(path)


def test_labels_that_look_like_formulas_or_are_alike() -> None:
    plot = heat("x", np.array([[1.0, 0.5]]), ["$$a$$", "$$a$$"], ["row"], ("column", "row", "value"))
    first, second = plot.columns["column"]
    assert not any("$$" in label for label in (first, second))  # bokeh would load a library for them
    assert second == f"{first} (2)"
