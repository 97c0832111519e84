"""Means, intervals, costs to a target and corrected tests, by hand."""

import math
from dataclasses import replace

import pytest

from hfedmoe.compare.cells import Result, Round
from hfedmoe.compare.figures import curve
from hfedmoe.compare.grid import Point
from hfedmoe.compare.merits import COLUMNS, compared, holm, interval, until
from hfedmoe.compare.stored import Block
from hfedmoe.compare.summary import as_csv, as_markdown, target_of
from hfedmoe.config import RunConfig


def result(method: str, seed: int, accuracies: list[float | None], cost: int = 10) -> Result:
    rounds = [
        Round(
            number,
            accuracy,
            accuracy,
            1.0,
            bytes_up=cost * bool(number),
            bytes_down=cost * bool(number),
            flops=5.0,
            clients=4,
        )
        for number, accuracy in enumerate(accuracies)
    ]
    return Result(
        method=method,
        seed=seed,
        digest="d",
        config={},
        code="0+1",
        machine={"processor": "abacus", "threads": 1},
        seconds=1.0,
        peak_bytes=1,
        rounds=rounds,
        client_rows=[1, 1],
        client_accuracy=[0.2, 0.4, 0.9],
        client_peak_bytes=[7, 3],
    )


def test_the_interval_is_student_s() -> None:
    found = interval([0.5, 0.6, 0.7])
    assert found is not None
    assert found.mean == pytest.approx(0.6)
    assert found.half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert interval([0.5]) is not None
    assert interval([0.5]).half is None  # type: ignore[union-attr]
    assert interval([]) is None


def test_holm_corrects_step_by_step() -> None:
    # Smallest times 4, next times 3, and so on, never below an earlier one.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, None, 0.9]) == [1.0, None, 1.0]
    assert holm([]) == []


def test_costs_count_up_to_the_round_that_reaches_the_target() -> None:
    found = result("a", 0, [0.1, 0.4, 0.6, 0.5])
    assert until(found, 0.6, lambda line: 1) == 2
    assert until(found, 0.4, lambda line: line.bytes_up + line.bytes_down) == 20
    assert until(found, 0.61, lambda line: 1) is None
    row = {name: of(found, 0.6) for name, of in COLUMNS.items()}
    assert (row["accuracy"], row["best accuracy"], row["FLOPs to target"]) == (0.5, 0.6, 10.0)
    assert (row["worst client"], row["median client"], row["best client"]) == (0.2, 0.4, 0.9)
    assert (row["bytes per round"], row["peak memory"], row["clients"]) == (20, 7, 4)


def test_methods_are_compared_on_the_seeds_that_both_have() -> None:
    results = [result("ours", seed, [0.1, 0.5 + seed / 10]) for seed in (0, 1, 2)]
    results += [result("theirs", seed, [0.1, 0.4 + seed / 10 + seed / 100]) for seed in (0, 1, 2, 3)]
    (found,) = compared(results, "ours")
    assert found.difference.number == 3
    assert found.difference.mean == pytest.approx(-0.09)
    # Differences -0.10, -0.09, -0.08: t = -0.09 / (0.01 / sqrt 3) with 2 degrees of freedom.
    assert found.p == pytest.approx(0.0040925, rel=1e-3)
    block = Block(Point(RunConfig()), results)
    text = as_markdown([block], "ours", [target_of(results, "ours")])
    assert "| `theirs` | -9.0 ± 2.5 | 0.004 | 3 |" in text
    assert "Target accuracy: 57.0%" in text
    # Only the last two seeds of ours (60 and 70 %) reach 57 %, in one round.
    assert "| 1.0 ± 0.0 (2 of 3) |" in text
    lines = as_csv([block], "ours", [0.5]).splitlines()
    assert len(lines) == 1 + 7 * len(COLUMNS) + 3
    (p,) = (line for line in lines if ',"p, against ours",' in line)
    assert float(p.split(",")[-1]) == found.p
    assert "hfedmoe 0+1: ours 0, 1, 2; theirs 0, 1, 2, 3" in text


def test_pairs_are_of_one_machine_where_there_are_such() -> None:
    here, there = {"processor": "abacus", "threads": 1}, {"processor": "slide rule", "threads": 1}
    ours = [replace(result("ours", 0, [0.1, accuracy]), machine=m) for accuracy, m in ((0.5, here), (0.6, there))]
    ours.append(result("ours", 1, [0.1, 0.7]))
    theirs = [replace(result("theirs", seed, [0.1, 0.8]), machine=there) for seed in (0, 1)]
    (found,) = compared([*ours, *theirs], "ours")
    # Seed 0 has a pair of the same machine (0.8 - 0.6), seed 1 has none (0.8 - 0.7).
    assert found.difference.mean == pytest.approx(0.15)
    assert (found.difference.number, found.mixed) == (2, 1)
    text = as_markdown([Block(Point(RunConfig()), [*ours, *theirs])], "ours", [0.5])
    assert "| 2 (1 of another machine, code or base) |" in text
    assert "abacus, 1 thread(s); slide rule, 1 thread(s)." in text
    assert "Base models of one name differ" not in text
    for one, digest in zip(theirs, ("0123456789abcdef", "fedcba9876543210"), strict=True):
        one.base = digest
    text = as_markdown([Block(Point(RunConfig()), [*ours, *theirs])], "ours", [0.5])
    assert "**Base models of one name differ**: 0123456789ab, fedcba987654." in text


def test_a_curve_has_the_points_that_all_seeds_measured() -> None:
    x, y, half = curve([result("a", 0, [0.2, None, 0.6]), result("a", 1, [0.4, 0.5, 0.8])], lambda line: line.bytes_up)
    assert x == [0, 20]
    assert y == pytest.approx([0.3, 0.7])
    assert half[0] == pytest.approx(12.706205 * math.sqrt(0.02) / math.sqrt(2), rel=1e-6)
