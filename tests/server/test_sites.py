"""What devices say that they gained: measured on the device, checked by the server, and told once."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from hfedmoe.client.judging import compared
from hfedmoe.data.example import Example
from hfedmoe.data.kept import LEAST
from hfedmoe.events import OwnResult, SiteGain
from hfedmoe.server.attendance import Attendance
from hfedmoe.server.evaluation import Metrics
from hfedmoe.server.sites import gain_of
from hfedmoe.wire import checks
from hfedmoe.wire.messages import InvalidReplyError, measure_reply, pack_bits
from tests.federation import Federation, tiny_config
from tests.test_simulation import Notes
from tests.wire.test_checks import message

TOLD = OwnResult(
    trained_rows=90,
    own_rows=20,
    right_before=5,
    won=8,
    lost=2,
    f1_before=0.125,
    f1_after=0.5,
    loss_before=2.0,
    loss_after=1.5,
)


@pytest.fixture(scope="module")
def measured() -> tuple[Federation, Notes]:
    """A run of one round; of its clients two kept rows back, one too few, and one does not measure."""
    notes = Notes()
    config = tiny_config("federation.rounds=1", 'clients.budgets=["100%","25%","50%","50%"]')
    run = Federation(None, config, notes)
    for device, count in zip(run.devices, (12, LEAST, LEAST - 1, 12), strict=True):
        device.kept = [run.prepared.task.test[(device.number + i) % 30] for i in range(count)]
        device.judge = run.prepared.measure_now if device.number != 3 else None
    run.server.asks_sites = True
    run.run()
    return run, notes


def test_devices_that_can_say_what_they_gained(measured: tuple[Federation, Notes]) -> None:
    run, _ = measured
    found = run.server.keeper.gains
    assert [(gain.client, gain.own_rows) for gain in found] == [(0, 12), (1, LEAST)]
    assert [gain.trained_rows for gain in found] == [len(device.examples) for device in run.devices[:2]]
    assert all(gain.labels == {} and gain.num_labels == 0 for gain in found)
    # The first holds every expert, so its sub-model is the model.
    device, gain = run.devices[0], found[0]
    before = run.prepared.measure_on(device.kept, device.initial)
    after = run.prepared.measure_on(device.kept, run.server.tensors)
    assert gain.before.accuracy == before.accuracy
    assert gain.federated.accuracy == after.accuracy
    assert gain.federated.macro_f1 == after.macro_f1
    assert gain.before.loss == pytest.approx(before.loss)
    assert gain.federated.loss == pytest.approx(after.loss)
    assert gain.federated.loss != gain.before.loss


def test_a_device_measures_once(measured: tuple[Federation, Notes]) -> None:
    run, notes = measured
    before = list(run.server.keeper.gains)
    assert notes.warnings == []
    run.server._ask_sites(here(run))
    assert len(notes.warnings) == 4  # also those with nothing to tell were asked
    assert all("it has measured in this run already" in text for text in notes.warnings)
    assert run.server.keeper.gains == []
    run.server.keeper.gains = before


def here(run: Federation) -> Attendance:
    """All clients, each with two experts of every layer planned."""
    attendance = run.server.attendance(run.grid)
    attendance.gather()
    keep = [torch.arange(number) < 2 for number in run.server.num_experts]
    for member in attendance.members.values():
        member.resident_bits = pack_bits(keep)
    return attendance


def test_counts_become_accuracies_and_a_gain() -> None:
    gain = gain_of(3, "north", TOLD)
    assert (gain.client, gain.name, gain.trained_rows, gain.own_rows) == (3, "north", 90, 20)
    assert (gain.before.accuracy, gain.federated.accuracy) == (5 / 20, 11 / 20)
    assert (gain.before.macro_f1, gain.federated.macro_f1) == (0.125, 0.5)
    assert gain.gain == 6 / 20
    low, high = gain.gain_interval or (0, 0)
    assert low < 0.3 < high
    assert SiteGain.from_json(gain.to_json()) == gain


def test_what_is_compared_are_the_same_rows() -> None:
    rows = [Example(text="t", choices=("a", "b"), answer=answer) for answer in (0, 1, 1, 0, 1)]
    before = Metrics(0.4, 0.3, 2.0, 5, 1.0, predicted=(0, 0, 1, 1, 0))
    after = Metrics(0.6, 0.5, 1.0, 5, 1.0, choice_loss=0.75, predicted=(1, 1, 1, 1, 1))
    told = compared(7, rows, before, after)
    assert (told.right_before, told.won, told.lost) == (2, 2, 1)
    assert (told.f1_before, told.f1_after, told.loss_before, told.loss_after) == (0.3, 0.5, 2.0, 0.75)
    texts = [Example(text="t", choices=(), answer=0, completion="u")]
    told = compared(7, texts, Metrics(None, None, 2.0, 1, 1.0), Metrics(None, None, 1.0, 1, 1.0))
    assert (told.right_before, told.won, told.lost, told.loss_after) == (None, None, None, 1.0)


def test_an_answer_without_rows_says_nothing_else() -> None:
    nothing = OwnResult(trained_rows=90, own_rows=0)
    assert checks.own_result(message(measure_reply(nothing)), 50, True) == nothing
    assert checks.own_result(message(measure_reply(replace(TOLD, own_rows=0))), 50, True) == nothing


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ({"own_rows": -1}, "own_rows is not"),
        ({"own_rows": 10**9}, "own_rows is not"),
        ({"trained_rows": 0}, "trained_rows is not"),
        ({"right_before": 21}, "right_before is not"),
        ({"right_before": None}, "right_before is not"),
        ({"won": 16}, r"won is not a whole number in \[0, 15\]"),
        ({"lost": 6}, r"lost is not a whole number in \[0, 5\]"),
        ({"f1_after": 1.5}, "f1_after is not"),
        ({"f1_before": "much"}, "f1_before is not"),
        ({"loss_after": float("nan")}, "loss_after is not"),
        ({"loss_before": float("inf")}, "loss_before is not"),
    ],
)
def test_answers_are_checked(lie: dict[str, Any], reason: str) -> None:
    assert checks.own_result(message(measure_reply(TOLD)), 50, True) == TOLD
    with pytest.raises(InvalidReplyError, match=reason):
        checks.own_result(message(measure_reply(replace(TOLD, **lie))), 50, True)
