"""What devices say that they gained: measured on the device, checked by the server, and told once."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict

from hfedmoe.client.app import OWN_EXPERTS, trouble_of
from hfedmoe.client.judging import compared
from hfedmoe.client.personal import PERSONAL as PERSONAL_MARK
from hfedmoe.client.personal import mark_of, require_due
from hfedmoe.client.policy import Policy, PolicyError
from hfedmoe.client.tuning import Tuned
from hfedmoe.data.example import Example
from hfedmoe.data.kept import LEAST
from hfedmoe.events import OwnResult, OwnScore, Personal, Score, SiteGain, Tuning
from hfedmoe.moe.payload import layer_of
from hfedmoe.report.live.gains import explained, gains_table
from hfedmoe.runs.folder import RunFolder
from hfedmoe.server.attendance import Attendance
from hfedmoe.server.evaluation import Metrics
from hfedmoe.server.members import Member
from hfedmoe.server.sites import ask_sites, gain_of, with_tuning
from hfedmoe.wire import checks
from hfedmoe.wire.local import changed_contexts
from hfedmoe.wire.messages import PERSONAL, Description, InvalidReplyError, measure_reply, pack_bits
from hfedmoe.wire.requests import InvalidRequestError
from hfedmoe.wire.trouble import POLICY_TUNE
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


STEPS, NONE = 3, Score(None, None, 0.0)


class Heard(Notes):
    """Remembers also what clients measured while the run went on."""

    def __init__(self) -> None:
        super().__init__()
        self.own: list[tuple[int, Sequence[Personal]]] = []

    def personal(self, round: int, found: Sequence[Personal]) -> None:
        self.own.append((round, found))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, Heard]:
    """A run of one round; of its clients two kept rows back, one too few, and one does not measure.

    After it they train on for themselves, except the third, whose owner does not allow it.
    """
    notes, folder = Heard(), tmp_path_factory.mktemp("devices")
    more = (f"evaluation.tune_steps={STEPS}", "evaluation.personal_every=1")
    config = tiny_config("federation.rounds=1", *more, 'clients.budgets=["100%","25%","50%","50%"]')
    run = Federation(RunFolder.create(folder / "run", config), config, notes)
    for device, count in zip(run.devices, (12, LEAST, LEAST - 1, 12), strict=True):
        device.kept = [run.prepared.task.test[(device.number + i) % 30] for i in range(count)]
        device.judge = run.prepared.measure_now if device.number != 3 else None
        device.tuned = folder / str(device.number) / "tuned.safetensors"
        device.policy = Policy(tune=device.number != 2)
    run.server.asks_sites = True
    run.run()
    return run, notes


def test_devices_that_can_say_what_they_gained(measured: tuple[Federation, Heard]) -> None:
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
    assert gain.federated == gain.own == gain.reached
    assert gain.reached.accuracy == after.accuracy
    assert gain.reached.macro_f1 == after.macro_f1
    assert gain.before.loss == pytest.approx(before.loss)
    assert gain.reached.loss == pytest.approx(after.loss)
    assert gain.reached.loss != gain.before.loss
    # Of the second nobody knows how good the whole model is on its rows.
    assert (found[1].federated, found[1].reached) == (None, found[1].own)


def test_devices_also_say_it_while_the_run_goes_on(measured: tuple[Federation, Heard]) -> None:
    run, notes = measured
    ((round, found),) = notes.own
    assert round == 1
    assert [(one.client, one.own_rows) for one in found] == [(0, 12), (1, LEAST)]
    assert run.server.untold == {2, 3}
    # The first holds every expert, so what it measures is the shared model; of the second nobody knows that.
    first, second = run.server.keeper.gains
    assert (found[0].accuracy, found[0].loss) == (first.reached.accuracy, pytest.approx(first.reached.loss))
    assert (found[0].shared_accuracy, found[0].shared_loss) == (found[0].accuracy, found[0].loss)
    assert (found[1].accuracy, found[1].loss) == (second.reached.accuracy, pytest.approx(second.reached.loss))
    assert (found[1].shared_accuracy, found[1].shared_loss) == (None, None)
    assert Personal.from_json(json.loads(json.dumps(asdict(found[1])))) == found[1]


def test_measuring_while_the_run_goes_on_changes_no_bit() -> None:
    ends = []
    for every in (0, 1):
        heard = Heard()
        run = Federation(None, tiny_config("train.steps=1", f"evaluation.personal_every={every}"), heard)
        for device in run.devices:
            device.kept, device.judge = run.prepared.task.test[:LEAST], run.prepared.measure_now
        run.run()
        ends.append((run.server.tensors, changed_contexts(run.grid)))
        assert [round for round, _ in heard.own] == [1, 2] * every
    (plain, states), (measured, others) = ends
    assert plain.keys() == measured.keys()
    assert all(torch.equal(tensor, measured[name]) for name, tensor in plain.items())
    assert states == others


def test_a_server_cannot_ask_more_often_or_about_another_model(measured: tuple[Federation, Heard]) -> None:
    run, _ = measured
    attendance = here(run)

    def asked(round: int) -> str:
        member = attendance.members[0]
        (answer,) = attendance.ask([run.server.request(member, PERSONAL, round)], "again")
        return answer.reason

    assert "it has answered in this run already, for another model" in asked(1)
    assert "ask for no measurement in round 2" in asked(2)  # there is one round only
    config = tiny_config("federation.rounds=5", "evaluation.personal_every=2")
    require_due(config, 4)
    for other in (3, 6):
        with pytest.raises(InvalidRequestError, match=f"no measurement in round {other}"):
            require_due(config, other)
    with pytest.raises(InvalidRequestError, match="no measurement"):
        require_due(tiny_config(), 1)


def test_what_a_device_trains_for_itself_stays_with_it(measured: tuple[Federation, Heard]) -> None:
    run, notes = measured
    assert [device.tuned.is_file() for device in run.devices if device.tuned] == [True, True, False, True]
    assert len(notes.warnings) == 1
    assert "client 2 does not train on for itself: " in notes.warnings[0]
    assert "this device has tune off" in notes.warnings[0]
    assert not any(OWN_EXPERTS in context.state for context in run.grid.contexts.values())
    assert (run.server.keeper.gains[0].tuning or Tuning(0, NONE, NONE)).steps == STEPS
    # What is in the first one's file is what it said: it holds every expert, so both models are whole.
    device, gain = run.devices[0], run.server.keeper.gains[0]
    assert device.tuned is not None
    assert gain.tuning is not None
    tuned = Tuned.read(device.tuned, run.server.num_experts)
    assert (tuned.client, tuned.round, tuned.steps) == (0, 1, STEPS)
    after = run.prepared.measure_on(device.kept, tuned.memory.tensors)
    assert gain.tuning.after.loss == pytest.approx(after.loss)
    assert gain.tuning.before.loss == pytest.approx(gain.reached.loss)
    assert gain.tuning.after.loss != gain.tuning.before.loss
    assert gain.tuning.before.accuracy == gain.reached.accuracy
    # The second has a file of its eight experts only.
    device = run.devices[1]
    assert device.tuned is not None
    own = Tuned.read(device.tuned, run.server.num_experts).memory
    assert sum(int(known.sum()) for known in own.experts) == 8
    assert all(
        len(own.tensors[name]) == int(own.experts[layer_of(name)].sum()) for name in own.tensors if "exp" in name
    )


def test_a_server_that_goes_on_after_the_last_round_hears_the_same(
    measured: tuple[Federation, Heard], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No round is planned any more: who held what is in the run folder, and devices remember what they answered."""
    run, notes = measured
    keeper, seen = run.server.keeper, len(notes.warnings)
    before, keeper.gains = keeper.gains, []
    monkeypatch.setattr(keeper, "knows_sites", lambda round: False)  # it was killed before it wrote them down
    attendance = run.server.attendance(run.grid)
    attendance.gather()
    ask_sites(run.server, attendance)
    assert keeper.gains == before
    assert [text for text in notes.warnings[seen:] if "answered" in text] == []


def test_a_device_measures_and_trains_on_once(
    measured: tuple[Federation, Heard], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, notes = measured
    monkeypatch.setattr(run.server.keeper, "knows_sites", lambda round: False)
    before, seen = list(run.server.keeper.gains), len(notes.warnings)
    written = [device.tuned.stat().st_mtime_ns for device in run.devices if device.tuned and device.number != 2]
    ask_sites(run.server, here(run))
    warned = notes.warnings[seen:]
    assert sum("it has answered in this run already" in text for text in warned) == 7
    assert len(warned) == 8  # also those with nothing to tell were asked
    assert run.server.keeper.gains == []
    assert written == [d.tuned.stat().st_mtime_ns for d in run.devices if d.tuned and d.number != 2]
    run.server.keeper.gains = before


def test_an_owners_most_steps_hold_after_the_last_round_too() -> None:
    Policy(max_steps=4).check_tuning(4)
    with pytest.raises(PolicyError, match=r"5 steps after the last round .* max-steps of this device is 4") as caught:
        Policy(max_steps=4).check_tuning(5)
    assert trouble_of(caught.value).code == POLICY_TUNE


def here(run: Federation) -> Attendance:
    """All clients, each with two experts of every layer planned."""
    attendance = run.server.attendance(run.grid)
    attendance.gather()
    keep = [torch.arange(number) < 2 for number in run.server.num_experts]
    for member in attendance.members.values():
        member.resident_bits = pack_bits(keep)
    return attendance


def member(*held: int) -> Member:
    """Client 3, called north, which holds so many of the four experts of each layer."""
    about = Description(3, "north", 90, 8, [4] * len(held))
    return Member(7, about, 0, resident_bits=pack_bits([torch.arange(4) < number for number in held]))


def test_counts_become_accuracies_and_a_gain() -> None:
    gain = gain_of(member(4, 4), TOLD)
    assert gain_of(member(4, 3), TOLD) == replace(gain, federated=None)
    assert (gain.client, gain.name, gain.trained_rows, gain.own_rows) == (3, "north", 90, 20)
    assert (gain.before.accuracy, gain.reached.accuracy) == (5 / 20, 11 / 20)
    assert (gain.before.macro_f1, gain.reached.macro_f1) == (0.125, 0.5)
    assert gain.federated == gain.own
    assert gain.gain == 6 / 20
    low, high = gain.gain_interval or (0, 0)
    assert low < 0.3 < high
    assert SiteGain.from_json(gain.to_json()) == gain
    earlier = gain.to_json()
    del earlier["own"]
    assert SiteGain.from_json(earlier) == replace(gain, own=None)


def test_the_table_says_which_model_a_device_measured() -> None:
    whole, part = gain_of(member(4, 4), TOLD), gain_of(member(1, 4), TOLD)

    def columns(*gains: SiteGain) -> list[str]:
        return [str(column.header) for column in gains_table(gains).columns]

    assert columns(whole)[3:5] == ["before", "federated"]
    assert columns(part)[3:5] == ["before", "own"]
    assert columns(whole, part)[3:6] == ["before", "federated", "own"]
    assert "federated less before" in explained([whole])
    assert "own less before" in explained([part])
    assert "own: the experts that the device holds" in explained([whole, part])


def test_counts_also_say_what_training_on_gained() -> None:
    gain = gain_of(member(4, 4), replace(TOLD, won=3))
    nothing = OwnResult(trained_rows=90, own_rows=0)
    assert with_tuning([gain], {}, 4) == with_tuning([gain], {3: nothing}, 4) == [gain]
    assert "tuning" not in gain.to_json()
    (tuned,) = with_tuning([gain], {3: TOLD}, 4)
    assert tuned.tuning is not None
    assert (tuned.tuning.steps, tuned.tuning.before.accuracy, tuned.tuning.after.accuracy) == (4, 5 / 20, 11 / 20)
    assert tuned.tuning.gain == 6 / 20
    assert replace(tuned, tuning=None) == gain
    assert SiteGain.from_json(json.loads(json.dumps(tuned.to_json()))) == tuned


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


def test_answers_while_the_run_goes_on_are_checked() -> None:
    told = OwnScore(own_rows=20, right=5, loss=2.0)
    assert checks.own_score(message(measure_reply(told)), 50, True) == told
    assert checks.own_score(message(measure_reply(told)), 50, False) == replace(told, right=None)
    assert checks.own_score(message(measure_reply(replace(told, own_rows=0))), 50, True) == OwnScore(own_rows=0)
    lies: dict[str, dict[str, Any]] = {
        "right is not": {"right": 21},
        "right is not a whole": {"right": None},
        "own_rows is not": {"own_rows": 10**9},
        "loss is not": {"loss": float("nan")},
    }
    for reason, lie in lies.items():
        with pytest.raises(InvalidReplyError, match=reason):
            checks.own_score(message(measure_reply(replace(told, **lie))), 50, True)


def test_answers_of_rounds_that_are_long_over_are_forgotten() -> None:
    state = RecordDict({f"{PERSONAL_MARK}{round}": ConfigRecord({"request": "x"}) for round in (2, 4, 20)})
    state[f"{PERSONAL_MARK}4/answer"] = ConfigRecord({"own_rows": 12})
    assert mark_of(state, 20) == f"{PERSONAL_MARK}20"
    assert list(state) == [f"{PERSONAL_MARK}20"]
    assert mark_of(state, 5) == f"{PERSONAL_MARK}5"
    with pytest.raises(InvalidRequestError, match="round 4 is long over"):
        mark_of(state, 4)
