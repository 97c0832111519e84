"""What a page reads from the folder of a run."""

from pathlib import Path

import numpy as np
import pytest

from hfedmoe.errors import UserError
from hfedmoe.report.page.learned import confusion, curves, examples
from hfedmoe.report.page.plots import heat
from hfedmoe.report.page.story import read_story
from hfedmoe.report.page.who import alarms, client_rows, expert_plots, split_plot
from tests.report.page.runs import small_run


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
    north, south = client_rows(read_story(small_run(tmp_path / "run")).clients)
    assert (north["name"], north["rows"], north["rounds"], north["down"], north["up"]) == (
        "north.csv",
        10,
        2,
        2000,
        1000,
    )
    assert (north["held"], north["trained"], north["total"], north["seconds"]) == (3, 2, 5, 3.0)
    assert (north["first"], north["last"], north["left_out"]) == (2.0, 1.0, "")
    assert (south["name"], south["rounds"], south["left_out"]) == ("south.csv", 1, "late: no answer (1)")


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
    experts.usage[:, 0] = [[1, 1, 1], [1, 0, 0]]
    assert not any("collapsed" in text for text in alarms(experts))  # 1 of 3 is more than a quarter
    experts.usage, experts.trained = (np.zeros((2, 1, 5), np.float32) for _ in range(2))
    experts.usage[:, 0] = [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert "Layer 0 has collapsed: it really uses 1.0 experts; in the first round it used 5.0." in alarms(experts)


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
    accuracy = by_title["Accuracy over rounds"].columns
    assert list(zip(*accuracy.values(), strict=True)) == [
        ("all held-out rows", 0, 0.25),
        ("all held-out rows", 2, 0.75),
        ("watched rows", 1, 0.5),
        ("watched rows", 2, 0.5),
    ]
    assert by_title["Accuracy over time"].columns["minutes of all rounds"] == [0, 2, 1, 2]


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
