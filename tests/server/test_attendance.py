"""Clients come, leave and come back while a run goes on."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hfedmoe.errors import UserError
from hfedmoe.events import ClientRound, Participant, Watcher
from hfedmoe.server import attendance
from hfedmoe.wire import exchange
from tests.federation import Federation, tiny_config
from tests.server.network import Network, message_to

QUICK = ("data.test_rows=6", "evaluation.watch_rows=0", "train.steps=1")


class Clock:
    """Time passes only while the server waits."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waited: Callable[[], None] = lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, _: float) -> None:
        self.now += 100.0
        self.waited()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The server looks at every opportunity, and asks again at once."""
    clock, honest = Clock(), exchange._message
    for module in (attendance, exchange):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(exchange, "HERE_S", 0.0)
    monkeypatch.setattr(attendance, "AGAIN_S", 0.0)
    monkeypatch.setattr(
        exchange, "_message", lambda grid, *rest: (message_to if isinstance(grid, Network) else honest)(grid, *rest)
    )
    return clock


class Heard(Watcher):
    """Writes down who came and went, and lets the test change the network before each round and each training."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.phases: list[str] = []
        self.warnings: list[str] = []
        self.rounds: dict[int, dict[int, str]] = {}
        self.after: dict[int, Callable[[], None]] = {}
        self.training: dict[tuple[int, int], Callable[[], None]] = {}

    def start(self, title: str, num_rounds: int, first_round: int, clients: Any, history: Any = ()) -> None:
        self.events.append(("start", *(client.name for client in clients)))

    def joined(self, client: int, who: Participant, again: bool) -> None:
        self.events.append(("back" if again else "joined", client, who.name))

    def left(self, client: int) -> None:
        self.events.append(("left", client))

    def phase(self, text: str) -> None:
        self.phases.append(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def client_started(self, round: int, client: int, steps: int) -> None:
        self.training.pop((round, client), lambda: None)()

    def client_done(self, round: int, client: int, done: ClientRound) -> None:
        self.rounds.setdefault(round, {})[done.client] = done.status

    def round_done(self, round: int, seconds: float, bytes_down: int, bytes_up: int) -> None:
        self.after.pop(round, lambda: None)()


def changing(*nodes: int, overrides: tuple[str, ...] = ()) -> tuple[Federation, Network, Heard]:
    heard = Heard()
    ready = Federation(None, tiny_config(*QUICK, *overrides), heard)
    return ready, Network(ready.grid, *nodes), heard


def test_who_comes_late_takes_part_and_who_left_comes_back_as_the_same_client() -> None:
    ready, network, heard = changing(1, 2, 3, overrides=("federation.rounds=4", "method.bootstrap=prior"))

    def after_first() -> None:
        network.up[4] = "late"
        del network.up[2]

    def after_second() -> None:
        network.up[12], network.is_now[12] = "again", 2

    heard.after = {1: after_first, 2: after_second}
    ready.server.run(network)  # type: ignore[arg-type]
    ok = "ok"
    assert heard.rounds == {
        1: {0: ok, 1: ok, 2: ok},
        2: {0: ok, 2: ok, 3: ok},
        3: {0: ok, 1: ok, 2: ok, 3: ok},
        4: {0: ok, 1: ok, 2: ok, 3: ok},
    }
    assert heard.events == [
        ("start", "client 0", "client 1", "client 2"),
        ("left", 1),
        ("joined", 3, "client 3"),
        ("back", 1, "client 1"),
    ]
    assert heard.warnings == []
    # Nobody is asked twice who it is, and who comes late gets the federation's usage to plan with.
    asked = [node for kind, node, _ in network.got if kind == "query.describe"]
    assert asked == [1, 2, 3, 4, 12]
    assert ("query.plan", 4, True) in network.got
    assert [done.rounds for done in ready.server.keeper.final_totals()] == [4, 3, 4, 3]
    history = ready.grid.context(2).state  # of the client that came back: it went on with what it remembered
    assert "history" in history.config_records


def test_half_of_the_clients_fail_in_each_of_twenty_rounds(clock: Clock) -> None:
    """Who fails is chosen by lot: it is gone when it should train, and back under another id for the next round."""
    ready, network, heard = changing(1, 2, 3, 4, overrides=("federation.rounds=20", "train.lr=3e-3"))
    draws = random.Random(0)
    fails = {round: set(draws.sample(range(4), 2)) for round in range(1, 21)}
    ids = dict(enumerate((1, 2, 3, 4)))
    start = {name: tensor.clone() for name, tensor in ready.server.tensors.items()}

    def gone(client: int) -> None:
        del network.up[ids[client]]

    def back(round: int) -> None:
        for client in fails[round]:
            ids[client] += 10
            network.up[ids[client]], network.is_now[ids[client]] = "again", client + 1

    for round, failing in fails.items():
        for client in failing:
            heard.training[round, client] = lambda client=client: gone(client)  # type: ignore[misc]
        heard.after[round] = lambda round=round: back(round)  # type: ignore[misc]
    ready.server.run(network)  # type: ignore[arg-type]
    assert heard.rounds == {
        round: {client: "left" if client in failing else "ok" for client in range(4)}
        for round, failing in fails.items()
    }
    assert clock.now < 20 * ready.prepared.config.federation.timeout_s
    took_part = [sum(client not in failing for failing in fails.values()) for client in range(4)]
    assert [done.rounds for done in ready.server.keeper.final_totals()] == took_part
    assert any((tensor != start[name]).any() for name, tensor in ready.server.tensors.items())


@pytest.mark.parametrize("restarted", [False, True], ids=["away", "restarted under the same id"])
def test_who_leaves_while_it_trains_costs_no_timeout_and_is_no_error(restarted: bool, clock: Clock) -> None:
    ready, network, heard = changing(1, 2, 3, 4, overrides=("federation.rounds=3",))

    def leave() -> None:
        del network.up[3]
        if restarted:
            network.up[3] = "second"

    heard.training = {(2, 3): leave}  # when the request to client 2 is sent
    network.last_first = True
    ready.server.run(network)  # type: ignore[arg-type]
    assert clock.now < ready.prepared.config.federation.timeout_s
    assert heard.rounds[2] == {0: "ok", 1: "ok", 2: "left", 3: "ok"}
    assert heard.rounds[3] == ({0: "ok", 1: "ok", 2: "ok", 3: "ok"} if restarted else {0: "ok", 1: "ok", 3: "ok"})
    assert heard.events[1:] == [("left", 2), *([("back", 2, "client 2")] if restarted else [])]
    assert heard.warnings == []


def test_a_round_with_too_few_waits_until_enough_are_back(clock: Clock) -> None:
    ready, network, heard = changing(1, 2, 3, 4, overrides=("federation.rounds=2", "federation.min_clients=4"))

    def leave() -> None:
        del network.up[2]
        clock.waited = come_back

    def come_back() -> None:
        if clock.now == 200.0:
            network.up[2] = "second"

    heard.after = {1: leave}
    ready.server.run(network)  # type: ignore[arg-type]
    assert heard.phases[-1] == "waiting: 3 clients here, federation.min_clients = 4"
    assert heard.rounds[2] == dict.fromkeys(range(4), "ok")


def test_a_round_with_too_few_waits_only_as_long_as_configured(clock: Clock) -> None:
    ready, network, heard = changing(1, 2, 3, 4, overrides=("federation.rounds=2", "federation.min_clients=4"))
    heard.after = {1: lambda: network.up.pop(2)}
    with pytest.raises(UserError, match=r"3 clients are here after 300 s, fewer than federation.min_clients = 4"):
        ready.server.run(network)  # type: ignore[arg-type]
    assert clock.now == 300.0
    assert ready.server.round == 1


def test_who_is_late_is_asked_again_only_after_it_has_answered() -> None:
    ready, network, heard = changing(1, 2, overrides=("federation.rounds=4",))
    heard.training = {(2, 1): lambda: network.asleep.add(2)}
    heard.after = {3: lambda: network.asleep.discard(2)}
    ready.server.run(network)  # type: ignore[arg-type]
    assert [heard.rounds[round].get(1) for round in (1, 2, 3, 4)] == ["ok", "late", None, "ok"]
    assert ("left", 1) not in heard.events
    assert heard.events[-1] == ("back", 1, "client 1")


def test_a_client_that_cannot_take_part_is_named_once_and_joins_when_it_can() -> None:
    ready, network, heard = changing(1, 2, 3, 4, overrides=("federation.rounds=3",))
    ready.devices[3].base = "another"
    heard.after = {2: lambda: setattr(ready.devices[3], "base", "")}
    ready.server.run(network)  # type: ignore[arg-type]
    assert [set(heard.rounds[round]) for round in (1, 2, 3)] == [{0, 1, 2}, {0, 1, 2}, {0, 1, 2, 3}]
    (warning,) = heard.warnings
    assert "a client on node 4 is left out: its base model is not the server's" in warning


def test_weights_do_not_depend_on_who_answers_first() -> None:
    found = []
    for last_first in (None, False, True):
        ready, network, _ = changing(1, 2, 3, 4)
        network.last_first = bool(last_first)
        ready.server.run(ready.grid if last_first is None else network)  # type: ignore[arg-type]
        found.append(ready.server.tensors)
    for other in found[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in found[0].items())
