"""Rounds that go on without the slowest, updates that come late, and no rounds at all; in simulated time."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.simulated_time import SimulatedTime
from flwr.app import Message

from hfedmoe.errors import UserError
from hfedmoe.runs.folder import RunFolder
from hfedmoe.wire.messages import DESCRIBE, PLAN, TRAIN
from tests.federation import Federation, tiny_config

Make = Callable[..., Federation]
SECONDS = (1.0, 1.5, 4.0, 9.0)
"""Of one training, by client."""
ROUNDS = ("federation.rounds=4", "evaluation.own_share=0")


class Timed(SimulatedTime):
    """Counts messages by kind and round."""

    def __init__(self, federation: Federation) -> None:
        super().__init__(federation.grid, lambda client: SECONDS[client])
        self.sent: Counter[str] = Counter()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        self.sent.update(message.metadata.message_type for message in messages)
        return super().push_messages(messages)


def rounds(make: Make, folder: Path, *settings: str) -> tuple[list[dict[str, Any]], Timed]:
    """The lines of metrics.jsonl of a run, and its carrier."""
    federation = make(*ROUNDS, *settings)
    grid = Timed(federation)
    federation.server.run(grid)
    return RunFolder.open(folder / "run").read_rounds()[1:], grid


def took_part(line: dict[str, Any]) -> list[tuple[int, int | str]]:
    """Client and staleness of every update, or its status."""
    return [(row["client"], row["staleness"] if row["status"] == "ok" else row["status"]) for row in line["clients"]]


def test_a_round_takes_one_message_per_client_after_the_first(federation: Make, tmp_path: Path) -> None:
    lines, grid = rounds(federation, tmp_path)
    assert grid.sent == {DESCRIBE: 4, PLAN: 4, TRAIN: 16}
    assert grid.now == 4 * 9.0
    assert all(took_part(line) == [(client, 0) for client in range(4)] for line in lines)


def test_a_method_that_plans_on_the_server_needs_no_more_messages(federation: Make, tmp_path: Path) -> None:
    _, grid = rounds(federation, tmp_path, "method.name=hfedmoe+")
    assert grid.sent == {DESCRIBE: 4, PLAN: 4, TRAIN: 16}


def test_a_method_that_needs_the_federations_usage_is_told_it_in_every_round(federation: Make, tmp_path: Path) -> None:
    _, grid = rounds(federation, tmp_path, "method.name=fedalign_moe", 'clients.budgets=["100%"]')
    assert grid.sent == {DESCRIBE: 4, PLAN: 16, TRAIN: 16}


def test_a_round_goes_on_without_the_slowest(federation: Make, tmp_path: Path) -> None:
    lines, grid = rounds(federation, tmp_path, "federation.clients_per_round=2", "federation.spare_clients=2")
    assert took_part(lines[0]) == [(0, 0), (1, 0), (2, "late"), (3, "late")]
    assert lines[0]["short"]
    assert lines[0]["clients"][2]["reason"] == "the round went on without it"
    # They are busy, and are not asked; client 2 is free again after 4 s, and its update is dropped.
    assert [took_part(line) for line in lines[1:3]] == [[(0, 0), (1, 0)]] * 2
    assert took_part(lines[3]) == [(0, 0), (1, 0), (2, "late")]
    assert grid.now == 4 * 1.5


def test_a_late_update_counts_in_the_round_in_which_it_comes(federation: Make, tmp_path: Path) -> None:
    settings = ("federation.clients_per_round=2", "federation.spare_clients=2", "federation.late=fold")
    lines, _ = rounds(federation, tmp_path, *settings)
    assert took_part(lines[0]) == [(0, 0), (1, 0), (2, "late"), (3, "late")]
    assert lines[0]["clients"][2]["reason"] == "its update counts when it comes"
    assert took_part(lines[2]) == [(0, 0), (1, 0), (2, 2)]
    down = [row["bytes_down"] for line in (lines[0], lines[2]) for row in line["clients"] if row["client"] == 2]
    assert down[0] > 100_000
    assert down[1] == 0  # counted once


def test_an_update_that_is_too_old_is_dropped(federation: Make, tmp_path: Path) -> None:
    settings = ("federation.clients_per_round=2", "federation.spare_clients=2", "federation.late=fold")
    lines, _ = rounds(federation, tmp_path, *settings, "federation.max_staleness=1")
    assert [took_part(line) for line in lines[1:3]] == [[(0, 0), (1, 0)]] * 2


def test_a_round_goes_on_when_its_time_is_up(federation: Make, tmp_path: Path) -> None:
    lines, _ = rounds(federation, tmp_path, "federation.round_s=1e-9", "federation.min_clients=2")
    assert took_part(lines[0]) == [(0, 0), (1, 0), (2, "late"), (3, "late")]


def test_without_rounds_whatever_comes_counts_and_who_answered_goes_on(federation: Make, tmp_path: Path) -> None:
    lines, grid = rounds(federation, tmp_path, "federation.mode=async", "federation.buffer=2")
    # The clock: 0 at 1, 1 at 1.5 | 0 at 2 (began at 1, before the model changed), 1 at 3 and 0 at 3 | ...
    assert [took_part(line) for line in lines[:2]] == [[(0, 0), (1, 0)], [(0, 1), (1, 0)]]
    assert any(row["client"] == 2 and row["staleness"] > 1 for line in lines for row in line["clients"])
    assert grid.now < 6.0  # with rounds 36
    assert grid.sent[PLAN] == 4
    assert not any(line["short"] for line in lines)


def test_a_fast_client_may_count_twice_before_the_model_changes(federation: Make, tmp_path: Path) -> None:
    lines, _ = rounds(federation, tmp_path, "federation.mode=async", "federation.buffer=3")
    assert took_part(lines[0]) == [(0, 0), (0, 0), (1, 0)]
    rows = RunFolder.open(tmp_path / "run").read_expert_rows()
    assert rows is not None
    assert [int(row["client"]) for row in rows[:3]] == [0, 0, 1]


@pytest.mark.parametrize("settings", [("federation.late=fold",), ("federation.round_s=1e6",)])
def test_where_nobody_is_late_the_weights_are_the_same(federation: Make, settings: tuple[str, ...]) -> None:
    plain, other = (Federation(None, tiny_config(*ROUNDS, *more)) for more in ((), settings))
    plain.run()
    other.server.run(Timed(other))
    for name, tensor in plain.server.tensors.items():
        assert torch.equal(other.server.tensors[name], tensor), name


def test_in_one_process_no_rounds_are_the_same_twice(federation: Make) -> None:
    one, other = (Federation(None, tiny_config(*ROUNDS, "federation.mode=async")) for _ in range(2))
    for run in (one, other):
        run.run()
    assert all(torch.equal(other.server.tensors[name], tensor) for name, tensor in one.server.tensors.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["federation.buffer=2"], "federation.buffer is about mode async"),
        (["federation.mode=async", "federation.late=fold"], "federation.late is about rounds"),
        (["federation.mode=async", "federation.buffer=1", "federation.min_clients=2"], "less than min_clients"),
        (["federation.clients_per_round=3", "federation.spare_clients=2"], "are more than clients.count=4"),
        (["federation.max_staleness=0"], "max_staleness"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(*settings)
