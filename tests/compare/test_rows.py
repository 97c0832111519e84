"""Rows of a comparison: methods with settings of their own."""

import pytest

from hfedmoe.compare.computing import cells_of
from hfedmoe.compare.rows import Row, all_differ, rows_of
from hfedmoe.compare.stored import Stored, block_of
from hfedmoe.errors import UserError
from tests.compare.test_stored import POINT, of


def test_a_row_has_a_method_and_settings() -> None:
    text = "hfedmoe, hfedmoe@method.layers=even @ method.gate=rows,local"
    assert rows_of(text) == [
        Row("hfedmoe"),
        Row("hfedmoe", ("method.layers=even", "method.gate=rows")),
        Row("local"),
    ]
    assert [row.name for row in rows_of(text)] == ["hfedmoe", "hfedmoe@method.layers=even@method.gate=rows", "local"]


def test_its_cells_are_those_of_the_setting() -> None:
    plain, changed = cells_of(POINT.config, rows_of("hfedmoe,hfedmoe@method.tau=0.25"), [3])
    assert (plain.shown, changed.shown) == ("hfedmoe", "hfedmoe@method.tau=0.25")
    assert changed.config.method.tau == 0.25
    method = POINT.config.method.model_copy(update={"tau": 0.25})
    (same,) = cells_of(POINT.config.model_copy(update={"method": method}), rows_of("hfedmoe"), [3])
    assert changed.file == same.file != plain.file


def test_the_options_of_another_method_are_left_out() -> None:
    method = POINT.config.method.model_copy(update={"name": "fedprox", "options": {"mu": 1.0}})
    config = POINT.config.model_copy(update={"method": method})
    assert Row("fedprox").config(config).method.options == {"mu": 1.0}
    assert Row("hfedmoe", ("method.tau=0.25",)).config(config).method.options == {}


def test_a_table_keeps_the_rows_apart() -> None:
    cells = cells_of(POINT.config, rows_of("hfedmoe,hfedmoe@method.tau=0.25"), [0])
    stored = Stored()
    for cell in cells:
        stored.add(of(cell, "abacus"))
    block = block_of(POINT, cells, stored)
    assert [found.method for found in block.results] == ["hfedmoe", "hfedmoe@method.tau=0.25"]
    assert block.missing == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" , ", "nothing is no method"),
        ("fedsgd", "fedsgd is no method; `hfedmoe methods`"),
        ("hfedmoe@tau=0", "hfedmoe@tau=0: expected method@section.key=value"),
        ("hfedmoe@method.tau", "expected method@section.key=value"),
        ("hfedmoe@method.name=local", "stands before the @"),
        ("hfedmoe@method.taw=0", r"--methods hfedmoe@method.taw=0: method.taw: unknown key; did you mean tau"),
        ("hfedmoe@method.tau=much", r"--methods hfedmoe@method.tau=much: method.tau"),
        ("hfedmoe,hfedmoe@method.tau=0.1", "hfedmoe@method.tau=0.1 is the same as hfedmoe; leave one out"),
    ],
)
def test_bad_rows_are_one_line(text: str, message: str) -> None:
    config = POINT.config.model_copy(update={"method": POINT.config.method.model_copy(update={"tau": 0.1})})
    with pytest.raises(UserError, match=message) as error:
        all_differ(rows_of(text), config)
    assert "\n" not in str(error.value)
