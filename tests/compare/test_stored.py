"""Which of several results of a cell a table takes."""

from dataclasses import replace

from hfedmoe.compare.cells import Cell, Result
from hfedmoe.compare.computing import cells_of
from hfedmoe.compare.grid import Point
from hfedmoe.compare.rows import rows_of
from hfedmoe.compare.stored import Stored, block_of
from tests.compare.test_merits import result
from tests.federation import tiny_config

POINT = Point(tiny_config())


def of(cell: Cell, processor: str) -> Result:
    found = result(cell.method, cell.seed, [0.1, 0.5])
    return replace(found, config=cell.config.model_dump(mode="json"), machine={"processor": processor, "threads": 1})


def test_the_table_takes_the_origin_that_has_most_methods_of_a_seed() -> None:
    cells = cells_of(POINT.config, rows_of("hfedmoe,random,local"), [0, 1])
    ours, random, local = (
        next(c for c in cells if c.method == m and c.seed == 0) for m in ("hfedmoe", "random", "local")
    )
    stored = Stored()
    for found in (of(ours, "abacus"), of(ours, "slide rule"), of(random, "slide rule"), of(local, "abacus")):
        stored.add(found)
    stored.add(of(local, "slide rule"))
    stored.add(replace(of(local, "abacus"), seconds=9.0))  # the same origin again
    assert [found.seconds for found in stored.of(local)] == [1.0, 1.0]
    block = block_of(POINT, cells, stored)
    assert [(found.method, found.machine["processor"]) for found in block.results] == [
        ("hfedmoe", "slide rule"),
        ("random", "slide rule"),
        ("local", "slide rule"),
    ]
    assert [(found.method, found.machine["processor"]) for found in block.others] == [
        ("hfedmoe", "abacus"),
        ("local", "abacus"),
    ]
    assert block.missing == ["hfedmoe 1", "random 1", "local 1"]


def test_validation_figures_take_the_place_of_the_others() -> None:
    found = result("local", 0, [0.1, 0.5])
    assert found.on_validation() is None
    found.rounds[1].watch_accuracy = 0.25
    validated = found.on_validation()
    assert validated is not None
    assert [line.accuracy for line in validated.rounds] == [None, 0.25]
    assert validated.client_accuracy == []
    # An earlier version measured the server's model, which nobody has where clients keep their own.
    assert replace(found, personal=True).on_validation() is None
    assert replace(found, personal=True, watch_rows=6).on_validation() is not None
