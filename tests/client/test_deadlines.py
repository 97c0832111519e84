"""Deadlines in whole rounds: a real federation whose steps take as long as a fake clock says."""

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, Metadata
from rich.console import Console

from hfedmoe.client.device import Device
from hfedmoe.client.history import ClientHistory
from hfedmoe.device.pace import Pace, StepTimes
from hfedmoe.events import Work
from hfedmoe.report.live import Live
from hfedmoe.runs.folder import RunFolder
from hfedmoe.wire import checks
from hfedmoe.wire.messages import InvalidReplyError, Update, train_reply
from tests.federation import Federation, tiny_config

Make = Callable[..., Federation]
QUICK = ("data.test_rows=6", "evaluation.watch_rows=1", "train.steps=3", "train.batch_size=2")


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def slow_steps(run: Federation, cost: Callable[[float], float]) -> None:
    """Let every step take `cost(experts per layer that it may train)` seconds of a fake clock."""
    for device in run.devices:
        paces: list[Pace] = []

        def pace(history: Any, resident: Any, make: Any = device.pace, paces: list[Pace] = paces) -> Pace | None:
            made: Pace | None = make(history, resident)
            assert made is not None
            paces.append(made)
            return made

        def on_step(client: int, step: int, loss: float, device: Device = device, paces: list[Pace] = paces) -> None:
            device.clock.now += cost(paces[-1].levels[-1])  # type: ignore[attr-defined]

        device.clock, device.on_step = FakeClock(), on_step
        device.pace = pace  # type: ignore[method-assign]


def test_clients_do_what_their_deadlines_leave(federation: Make, tmp_path: Path) -> None:
    out = io.StringIO()
    live = Live(Console(file=out))
    run = federation(*QUICK, "clients.deadlines_s=[1.5, 1000.0, 12.0, 5.0]", watcher=live)
    slow_steps(run, lambda level: 1 + 0.5 * level)
    run.run()
    first, second = ({row["client"]: row for row in line["clients"]} for line in _rounds(tmp_path))
    keys = ("steps", "steps_wanted", "activation", "deadline_s")
    # Client 0 holds top-2 in every layer: its step takes 2 s, whatever it does.
    assert [first[0][key] for key in keys] == [1, 3, 2.0, 1.5]
    assert [second[0][key] for key in keys] == [1, 3, 2.0, 1.5]
    # Client 1 has all the time: every step may train what it holds, 4 experts per layer on average.
    assert [first[1][key] for key in keys] == [3, 3, 4.0, 1000.0]
    # Client 2 holds all 8: 8, then 3 (5 s assumed to be half proportional), then what 4.5 s are enough for.
    assert first[2]["steps"] == 3
    assert first[2]["activation"] in (pytest.approx(17 / 3), pytest.approx(18 / 3))
    assert first[2]["seconds"] <= 12.0
    # In the second round it knows: 3 steps of 4 s each are 12 s; level 6 takes that, but for the doubt in the slope.
    assert second[2]["steps"] == 3
    assert 5 <= second[2]["activation"] <= 6
    assert second[2]["seconds"] <= 12.0
    assert first[2]["activation_wanted"] == 8
    # Client 3 holds 4 per layer (3 s): two at once would be 6 s, so the second step trains fewer.
    assert 1 <= first[3]["steps"] < 3
    assert first[3]["seconds"] <= 5.0
    assert all(row["status"] == "ok" for row in (*first.values(), *second.values()))
    assert "; 1 of 3 steps in 2.0 s (deadline 1.5 s), 2 of 2 experts per layer trained" in out.getvalue()
    live.final_table(run.server.keeper.final_totals(), None, None)
    table = out.getvalue()
    assert "per layer" in table
    assert "2/6" in table  # client 0: steps of both rounds


def _rounds(tmp_path: Path) -> list[dict[str, Any]]:
    return RunFolder.open(tmp_path / "run").read_rounds()[1:]


def test_a_deadline_far_away_changes_no_bit() -> None:
    ends = []
    for more in ((), ("clients.deadlines_s=[1e6]",), ("clients.deadlines_s=[1e6]", "clients.activation=3")):
        run = Federation(None, tiny_config(*QUICK, "federation.rounds=1", *more))
        run.run()
        ends.append(run.server.tensors)
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    assert not all(torch.equal(tensor, ends[2][name]) for name, tensor in ends[0].items())


def test_a_first_step_far_beyond_the_deadline_is_given_up_and_the_next_round_begins_lower(
    federation: Make, tmp_path: Path
) -> None:
    run = federation(*QUICK, "clients.deadlines_s=[3.0]", 'clients.budgets=["100%"]', "federation.min_clients=3")
    ticks: Iterator[int] = iter(range(0, 10**9, 10))
    run.devices[1].clock = lambda: float(next(ticks))  # 10 s pass whenever somebody looks
    for number in (0, 2, 3):
        run.devices[number].clock = FakeClock()
    run.run()
    first, second = ({row["client"]: row for row in line["clients"]} for line in _rounds(tmp_path))
    assert first[1]["status"] == "out of time"
    assert first[1]["reason"] == (
        "the forward pass of its first step took 10.0 s, and its deadline is 3 s; "
        "it trains fewer experts per step next round"
    )
    assert [first[number]["status"] for number in (0, 2, 3)] == ["ok"] * 3
    assert second[1]["status"] == "ok"  # at top-k experts it does its one step, however late
    assert (second[1]["steps"], second[1]["activation"]) == (1, 2.0)


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "more steps than wanted": ({"steps": 9}, "steps is not a whole number in [1, 3]"),
    "no step": ({"steps": 0}, "steps is not a whole number"),
    "activation": ({"activation": float("nan")}, "activation is not a number in (0, 8]"),
    "more experts than there are": ({"activation": 8.5}, "activation is not a number in (0, 8]"),
    "a deadline that did nothing": ({"activation": None}, "does not say how many experts its steps trained"),
    "deadline": ({"deadline_s": -1.0}, "deadline_s is not a number"),
    "another number of steps": ({"steps_wanted": 4}, "steps_wanted is not a whole number in [3, 3]"),
}


def test_what_a_client_says_of_its_work_is_checked() -> None:
    numbers = [8, 8]
    resident = [torch.ones(number, dtype=torch.bool) for number in numbers]
    vectors = [torch.full((number,), 1 / number) for number in numbers]
    asked = checks.Asked(3, [20, 20])
    work = Work(
        examples=10,
        steps=3,
        steps_wanted=3,
        first_loss=1.0,
        last_loss=1.0,
        mean_loss=1.0,
        activation=2.5,
        deadline_s=4.0,
    )
    honest = Update({}, resident, resident, vectors, vectors, vectors, work)

    def checked(update: Update) -> Update:
        metadata = Metadata(1, "1", 1, 0, "", "", 0.0, 60.0, "train")
        return checks.update(Message(train_reply(update), metadata=metadata), resident, {}, asked)  # type: ignore[call-overload]

    assert checked(honest).work == work
    checked(replace(honest, tokens=[torch.full((8,), 7.5)] * 2, usage=[torch.zeros(8), vectors[0]]))
    free = checked(replace(honest, work=replace(work, activation=None, deadline_s=None))).work
    assert free.activation is free.deadline_s is None
    for lie, reason in LIES.values():
        with pytest.raises(InvalidReplyError, match=re.escape(reason)):
            checked(replace(honest, work=replace(work, **lie)))


def test_a_history_keeps_what_was_measured_and_learned_and_reads_older_ones() -> None:
    history = ClientHistory.new([3, 2])
    assert set(history.to_tensors()) == {"mean", "weight", "counters"}
    history.step_times.add(3.0, 0.1)
    history.step_times.add(2.5, 0.3)
    history.limit = 4
    again = ClientHistory.from_tensors(history.to_tensors(), [3, 2])
    assert again.step_times == history.step_times
    assert again.limit == 4
    older = {name: tensor for name, tensor in history.to_tensors().items() if name not in ("step_times", "limit")}
    again = ClientHistory.from_tensors(older, [3, 2])
    assert again.step_times == StepTimes()
    assert again.limit is None
