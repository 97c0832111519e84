"""What is measured where clients share a model, and where each has its own, with answers that are set by hand."""

import pytest

from hfedmoe.compare.measuring import Measuring, hits, mean, own_mix, stripes
from hfedmoe.data.example import Example
from hfedmoe.prepare import Prepared
from hfedmoe.server.evaluation import Metrics
from tests.federation import Federation, tiny_config


def row(answer: int) -> Example:
    return Example("p", choices=("a", "b"), answer=answer)


def metrics(accuracy: float, macro_f1: float | None = 0.5) -> Metrics:
    return Metrics(accuracy, macro_f1, 1.0 - accuracy, 10, 2.0)


def test_each_row_is_measured_by_one_client_until_the_last_round() -> None:
    rows = [row(0) for _ in range(7)]
    parts = stripes(rows, 3)
    assert [[id(one) for one in part] for part in parts] == [[id(one) for one in rows[c::3]] for c in range(3)]
    # With fewer rows than clients each has one.
    assert [[rows.index(one) for one in part] for part in stripes(rows[:1], 3)] == [[0], [0], [0]]


def test_means_over_clients_count_their_rows() -> None:
    found = mean([metrics(0.2, 0.1), metrics(0.8, 0.5)], [3, 1], whole=True)
    assert (found.accuracy, found.macro_f1, found.loss) == pytest.approx((0.35, 0.2, 0.65))
    assert found.examples == 10
    part = mean([metrics(0.2), metrics(0.8)], [3, 1], whole=False)
    assert (part.macro_f1, part.examples) == (None, 20)


def test_a_client_s_accuracy_is_under_its_own_mix_of_labels() -> None:
    rows = [row(0), row(0), row(1), row(1)]
    correct = [True, False, True, True]
    # Recall 1/2 and 1; three rows of the first label and one of the second, and one of a label without test rows.
    assert own_mix(correct, rows, [3, 1, 1]) == pytest.approx((3 * 0.5 + 1) / 4)
    assert own_mix(correct, rows, [0, 0, 1]) == 0.0


def test_the_right_rows_are_those_that_count_in_the_accuracy() -> None:
    federation = Federation(None, tiny_config())
    prepared: Prepared = federation.prepared
    found = prepared.measure(prepared.initial, "all", None)
    right = hits(found, prepared.task.test)
    assert len(right) == 30
    assert found.accuracy == pytest.approx(sum(right) / 30)
    assert not {"predicted", "scores"} & found.figures().keys()
    assert hits(Metrics(None, None, 1.0, 30, 2.0), prepared.task.test) == []


def test_a_client_adds_the_logarithm_of_its_label_shares() -> None:
    rows = [row(0), row(1), row(1)]
    found = Metrics(1 / 3, 0.5, 1.0, 3, 2.0, predicted=(1, 1, 0), scores=((0.0, 0.5), (0.0, 2.0), (1.0, 0.0)))
    assert hits(found, rows) == [False, True, False]
    assert hits(found, rows, [5, 5]) == [False, True, False]
    # Three rows and none, one more of each: log 4 = 1.39 for the first label turns the first row, not the second.
    assert hits(found, rows, [3, 0]) == [True, True, False]
    assert hits(found, rows, [0, 3]) == [False, True, True]


def test_the_last_round_measures_every_client_on_all_rows_and_earlier_ones_together_once() -> None:
    federation = Federation(None, tiny_config("method.name=local", "train.steps=1"))
    prepared, seen = federation.prepared, list[int]()
    measured = prepared.measure_on
    prepared.measure_on = lambda rows, *rest: (seen.append(len(rows)), measured(rows, *rest))[1]  # type: ignore
    now = [0]
    measuring = Measuring(prepared, federation.simulation, [40] * 4, True, lambda: now[0])
    measuring(prepared.initial, "all")
    for now[0] in (1, 2):
        for kind in ("watch", "all"):
            measuring(prepared.initial, kind)
    # Round 0: one model. Round 1: 6 watched and 30 test rows, each once. Round 2, the last: all rows by each of 4.
    assert seen == [30, 2, 2, 1, 1, 8, 8, 7, 7, 6, 6, 6, 6, 30, 30, 30, 30]
    assert [one.examples for one in measuring.last] == [30] * 4
