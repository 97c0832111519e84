"""Messages to workers of Ray: the order of replies, and workers that die, hang or cannot start."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from hfedmoe.config import CarrierConfig
from hfedmoe.errors import UserError
from hfedmoe.events import Silent
from hfedmoe.wire.cluster import connected
from hfedmoe.wire.exchange import Answer, Request, exchange
from hfedmoe.wire.local import changed_contexts
from hfedmoe.wire.rayed import RayGrid
from hfedmoe.wire.worker import MakeApp, OnStep
from tests.ray_cluster import ray_cluster

pytest.importorskip("ray", reason='Ray is not installed: pip install "hfedmoe[ray]"')
pytestmark = pytest.mark.slow


class Notes(Silent):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, int, float]] = []
        self.warnings: list[str] = []

    def step(self, client: int, step: int, steps: int, loss: float) -> None:
        self.steps.append((client, step, steps, loss))

    def warning(self, text: str) -> None:
        self.warnings.append(text)


def obedient(on_step: OnStep) -> ClientApp:
    """An app that does what the message says, and remembers how many messages each client had."""
    app = ClientApp()

    @app.train()
    def do(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        what, seconds = message.content.config_records["do"]["what"], message.content.config_records["do"]["s"]
        assert isinstance(seconds, float)
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "raise":
            raise OSError("disk gone")
        on_step(client, 1, 0.5)
        time.sleep(seconds)
        had = context.state.config_records.get("had")
        count = len(had["messages"]) if had is not None else 0  # type: ignore[arg-type]
        context.state["had"] = ConfigRecord({"messages": bytes(count + 1)})
        facts = ConfigRecord({"client": client, "before": count, "pid": os.getpid()})
        return Message(RecordDict({"facts": facts}), reply_to=message)

    return app


def dies(on_step: OnStep) -> ClientApp:
    os.kill(os.getpid(), signal.SIGKILL)
    return ClientApp()


def refuses(on_step: OnStep) -> ClientApp:
    raise UserError("model.name = nowhere: no such folder")


def hangs(on_step: OnStep) -> ClientApp:
    time.sleep(600)
    return ClientApp()


class DiesOnce:
    """The first worker that makes an app dies of it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __call__(self, on_step: OnStep) -> ClientApp:
        try:
            self.trace.mkdir()
        except FileExistsError:
            return obedient(on_step)
        return dies(on_step)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ray_cluster() as found:
        yield found


@pytest.fixture
def notes() -> Notes:
    return Notes()


@contextmanager
def grid(
    address: str, notes: Notes, make_app: MakeApp = obedient, clients: int = 6, **more: object
) -> Iterator[RayGrid]:
    settings = CarrierConfig.model_validate({"kind": "ray", "address": address, **more})
    with connected(settings, clients, 1) as cluster:
        yield RayGrid(make_app, clients, cluster, notes, steps=7)


def ask(grid: RayGrid, what: dict[int, tuple[str, float]], timeout_s: float = 60.0) -> list[Answer]:
    """Tell every client something; by client: what to do, and for how many seconds."""

    def requests() -> Iterator[Request]:
        for client in range(grid.num_clients):
            do, seconds = what.get(client, ("", 0.0))
            yield Request(client + 1, "train", RecordDict({"do": ConfigRecord({"what": do, "s": seconds})}))

    return list(exchange(grid, requests(), "round", timeout_s))


def facts(answers: list[Answer], name: str) -> list[object]:
    return [a.reply.content.config_records["facts"][name] for a in answers if a.reply is not None]


def test_replies_come_in_the_order_of_requests_and_clients_remember(address: str, notes: Notes) -> None:
    with grid(address, notes) as carrier:
        assert carrier.most_open == 4
        first = ask(carrier, {0: ("", 1.0), 3: ("", 0.3)})
        assert facts(first, "client") == list(range(6))
        assert len(set(facts(first, "pid"))) == 2
        assert sorted(notes.steps) == [(client, 1, 7, 0.5) for client in range(6)]
        assert changed_contexts(carrier) == {f"{node}/had/messages": b"\0" for node in range(1, 7)}
        assert facts(ask(carrier, {}), "before") == [1] * 6
        assert not notes.warnings


def test_messages_of_which_nobody_waits_for_the_end_change_no_client(address: str, notes: Notes) -> None:
    with grid(address, notes) as carrier:
        ask(carrier, {})
        slow = RecordDict({"do": ConfigRecord({"what": "", "s": 60.0})})
        carrier.push_messages([carrier.create_message(slow, "train", node, "late", 90.0) for node in (1, 2, 3)])
        carrier.abandon()
        started = time.monotonic()
        assert facts(ask(carrier, {}), "before") == [1] * 6
        assert time.monotonic() - started < 60
    assert not notes.warnings


def test_death_and_errors_cost_one_reply_each(address: str, notes: Notes, caplog: pytest.LogCaptureFixture) -> None:
    with grid(address, notes, clients_at_once=1) as carrier:
        answers = ask(carrier, {1: ("die", 0.0), 3: ("raise", 0.0), 4: ("die", 0.0)})
        assert [a.status for a in answers] == ["ok", "failed", "ok", "failed", "failed", "ok"]
        assert [a.reason for a in answers if a.reply is None] == [
            "its worker process died",
            "OSError: disk gone",
            "its worker process died",
        ]
        assert [a.status for a in ask(carrier, {})] == ["ok"] * 6
        assert facts(ask(carrier, {}), "before") == [2, 1, 2, 1, 1, 2]
    text = caplog.text
    assert "client 1: no reply from its worker in train" in text
    assert "client 3 failed in train" in text
    assert "Traceback" in text
    assert "OSError: disk gone" in text


def test_a_client_that_hangs_is_late_and_the_others_are_not(address: str, notes: Notes) -> None:
    with grid(address, notes, clients_at_once=1) as carrier:
        assert [a.status for a in ask(carrier, {})] == ["ok"] * 6  # the worker has started
        answers = ask(carrier, {0: ("", 600.0)}, timeout_s=8.0)
        assert [a.status for a in answers] == ["late"] + ["ok"] * 5
        assert answers[0].reason == "no reply within 8 s"


def test_a_worker_that_dies_while_it_is_idle_costs_at_most_one_reply(address: str, notes: Notes) -> None:
    with grid(address, notes, clients_at_once=1) as carrier:
        (pid,) = set(facts(ask(carrier, {}), "pid"))
        assert isinstance(pid, int)
        os.kill(pid, signal.SIGKILL)
        statuses = [a.status for a in ask(carrier, {})]
        assert statuses[1:] == ["ok"] * 5


def test_a_worker_that_dies_while_it_starts_is_given_up(address: str, notes: Notes, tmp_path: Path) -> None:
    with grid(address, notes, DiesOnce(tmp_path / "trace"), clients_at_once=2) as carrier:
        answers = ask(carrier, dict.fromkeys(range(6), ("", 0.2)))
        assert [a.status for a in answers] == ["ok"] * 6
        assert len(set(facts(answers, "pid"))) == 1
        assert notes.warnings == ["a worker is given up (its worker process died); the run goes on with 1"]


@pytest.mark.parametrize(
    ("make_app", "seconds", "message"),
    [
        (dies, 180.0, "no worker of Ray could load the model: its worker process died"),
        (refuses, 180.0, "a worker of Ray cannot start: model.name = nowhere: no such folder"),
        (hangs, 3.0, "no worker of Ray could load the model: it was not ready within 3 s"),
    ],
)
def test_without_workers_the_run_ends_with_one_line(
    address: str, notes: Notes, make_app: MakeApp, seconds: float, message: str
) -> None:
    with grid(address, notes, make_app, start_timeout_s=seconds) as carrier:
        with pytest.raises(UserError, match=message) as raised:
            ask(carrier, {})
        assert "\n" not in str(raised.value)


def test_a_cluster_without_room_or_out_of_reach_is_refused(address: str, notes: Notes) -> None:
    for more, message in (
        ({"clients_at_once": 3}, "Ray has room for 2 workers with 1 CPUs and 0 GPUs each, not for 3; lower"),
        ({"cpus_per_client": 2}, "Ray has room for 0 workers with 2 CPUs"),
        ({"gpus_per_client": 1}, "Ray has room for 0 workers"),
        ({"address": "127.0.0.1:1"}, r"127.0.0.1:1: no Ray cluster answers there \(Connection refused\); start one"),
        ({"address": "127.0.0.1"}, "expected HOST:PORT"),
        ({"address": "ray://host:port"}, "expected HOST:PORT"),
    ):
        settings = {"address": address, **more}
        with pytest.raises(UserError, match=message), grid(notes=notes, **settings):  # type: ignore[arg-type]
            pass
