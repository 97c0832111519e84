"""Settings that vary, and their values on an axis."""

from typing import Any

import pytest

from hfedmoe.compare.grid import number_of, points_of
from hfedmoe.config import RunConfig, load_config
from hfedmoe.errors import UserError


def load(changes: list[str]) -> RunConfig:
    return load_config(None, changes)


def test_every_combination_is_a_point() -> None:
    points = points_of(['clients.budgets=["25%"]|["25%","100%"]', "method.score=ib | random"], load)
    assert [point.label for point in points] == [
        'clients.budgets = ["25%"], method.score = ib',
        'clients.budgets = ["25%"], method.score = random',
        'clients.budgets = ["25%","100%"], method.score = ib',
        'clients.budgets = ["25%","100%"], method.score = random',
    ]
    assert points[3].config.clients.budgets == ["25%", "100%"]
    assert points[3].config.method.score == "random"
    assert [point.number("clients.budgets") for point in points] == [25, 25, 62.5, 62.5]
    assert points[0].number("method.score") is None
    (alone,) = points_of([], load)
    assert (alone.label, alone.config) == ("", load([]))


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3.0),
        (0.5, 0.5),
        ("12.5%", 12.5),
        ([8, 16], 12.0),
        (["25%", "50%"], 37.5),
        ("4GiB", None),
        (["25%", 4], None),  # a share and a number of experts have no mean
        (["25%", "auto"], None),
        ([], None),
        (True, None),
        (None, None),
    ],
)
def test_a_value_is_a_number_or_has_no_axis(value: Any, number: float | None) -> None:
    assert number_of(value) == number


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        (["train.lr"], r"--vary train.lr: expected section.key=value\|value"),
        (["train.lr=1|"], r"--vary train.lr=1\|: expected section.key=value\|value"),
        (["seed=0|1"], r"--vary seed=0\|1: --seeds does that"),
        (["method.name=hfedmoe|random"], r"--methods does that"),
        (["train.lr=1", "train.lr=2"], r"train.lr is there twice"),
        (["train.lr=1|1.0"], r"--vary: train.lr = 1.0 is the same as train.lr = 1"),
        (["train.speed=1|2"], r"train.speed: unknown key"),
    ],
)
def test_bad_grids_are_one_line(vary: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        points_of(vary, load)
