"""Clients in this process and in workers of Ray: the same weights, metrics and checkpoints, and what can go wrong."""

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from hfedmoe import simulation
from hfedmoe.compare.cells import Cell
from hfedmoe.config import RunConfig
from hfedmoe.errors import UserError
from hfedmoe.events import ClientRound, Silent
from hfedmoe.prepare import prepare, server_for
from hfedmoe.runs.folder import RunFolder
from hfedmoe.runs.identity import read_identity
from hfedmoe.server.keeper import Keeper
from hfedmoe.simulated import WorkerApp, identity, split
from hfedmoe.simulation import resume, run
from hfedmoe.wire.messages import TRAIN
from hfedmoe.wire.requests import round_of
from hfedmoe.wire.same import Digests
from hfedmoe.wire.worker import OnStep
from tests.federation import tiny_config
from tests.ray_cluster import ray_cluster

with_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason='Ray is not installed: pip install "hfedmoe[ray]"'
)
SETTINGS = (
    "federation.rounds=2",
    "method.score=taylor",
    "method.gate=rows",
    "evaluation.alone=true",
    "evaluation.tune_steps=1",
    "evaluation.personal_every=2",
)
RAY = ("carrier.kind=ray", "carrier.clients_at_once=2")

CHILD = """
import os, signal, sys
from pathlib import Path
from hfedmoe.simulation import run
from hfedmoe.events import Silent
from tests.federation import tiny_config

class Killer(Silent):
    def client_started(self, round, client, steps):
        if (round, client) == (2, 2): os.kill(os.getpid(), signal.SIGKILL)

run(tiny_config(*sys.argv[2:]), Path(sys.argv[1]), Killer())
"""


class Notes(Silent):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, int]] = []
        self.done: list[tuple[int, int]] = []
        self.warnings: list[str] = []

    def step(self, client: int, step: int, steps: int, loss: float) -> None:
        self.steps.append((client, step, steps))

    def client_done(self, round: int, client: int, done: ClientRound) -> None:
        self.done.append((round, client))

    def warning(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ray_cluster() as found:
        yield found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process."""
    return run(tiny_config(*SETTINGS), tmp_path_factory.mktemp("runs") / "whole", Silent())


def check_same(one: Path, other: Path, leaving_out: str = "seconds") -> None:
    """Check that two runs have the same weights, memory of clients and metrics, bit for bit."""
    a, b = (RunFolder.open(path) for path in (one, other))
    mine, theirs = a.load_checkpoint("last"), b.load_checkpoint("last")
    assert mine.round == theirs.round == 2
    for tensors, others in ((mine.tensors, theirs.tensors), (mine.clients, theirs.clients)):
        assert tensors is not None
        assert others is not None
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, others[name]), name
    lines = [[without(leaving_out, line) for line in run.read_rounds()] for run in (a, b)]
    assert lines[0] == lines[1]
    assert (one / "experts.npy").read_bytes() == (other / "experts.npy").read_bytes()
    tuned = [{file.name: file.read_bytes() for file in (path / "tuned").iterdir()} for path in (one, other)]
    assert len(tuned[0]) == 4
    assert tuned[0] == tuned[1]


def without(names: str, line: Any) -> Any:
    """A line of metrics.jsonl without the keys that begin with one of these words."""
    if isinstance(line, list):
        return [without(names, entry) for entry in line]
    if isinstance(line, dict):
        left_out = tuple(names.split())
        return {key: without(names, value) for key, value in line.items() if not key.startswith(left_out)}
    return line


@with_ray
@pytest.mark.slow
def test_workers_that_each_serve_two_clients_end_with_the_weights_of_one_process(whole: Path, tmp_path: Path) -> None:
    notes, handler = Notes(), signal.getsignal(signal.SIGTERM)
    path = run(tiny_config(*SETTINGS, *RAY), tmp_path / "run", notes)
    assert signal.getsignal(signal.SIGTERM) is handler  # Ray replaces it
    check_same(whole, path)
    identity = read_identity(path)
    assert identity is not None
    assert identity.carrier == "ray"
    assert notes.done == [(round, client) for round in (1, 2) for client in range(4)]
    assert sorted(notes.steps) == sorted([(client, step, 2) for client in range(4) for step in (1, 2)] * 2)
    assert not notes.warnings


@with_ray
@pytest.mark.faults
def test_a_run_on_a_cluster_that_was_killed_goes_on_there(whole: Path, tmp_path: Path, address: str) -> None:
    settings = (*SETTINGS, RAY[0], "carrier.clients_at_once=1", f"carrier.address={address}")
    command = [sys.executable, "-c", CHILD, str(tmp_path / "run"), *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert RunFolder.open(tmp_path / "run").load_checkpoint("last").round == 1
    notes = Notes()
    resume(tmp_path / "run", notes)
    check_same(whole, tmp_path / "run", "seconds bytes")  # a resumed server asks for plans that it was told before
    assert notes.done == [(2, client) for client in range(4)]
    assert {step[0] for step in notes.steps} == {0, 1, 2, 3}


class Fatal(WorkerApp):
    """Kills the worker in which client 1 trains in round 1."""

    def __call__(self, on_step: OnStep) -> ClientApp:
        inner = super().__call__(on_step)
        rounds = self.config.federation.rounds

        def app(message: Message, context: Context) -> Message:
            trains = message.metadata.message_type == TRAIN and message.metadata.dst_node_id == 2
            if trains and round_of(message, rounds) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(message, context)

        return app  # type: ignore[return-value]


@with_ray
@pytest.mark.faults
def test_a_worker_that_dies_costs_one_update_and_the_run_goes_on(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulation, "WorkerApp", Fatal)
    notes = Notes()
    path = run(tiny_config(*RAY, f"carrier.address={address}"), tmp_path / "run", notes)
    _, first, second = RunFolder.open(path).read_rounds()
    assert [row["status"] for row in first["clients"]] == ["ok", "failed", "ok", "ok"]
    assert first["clients"][1]["reason"] == "its worker process died"
    assert first["short"] is True
    assert [row["status"] for row in second["clients"]] == ["ok"] * 4
    assert second["short"] is False
    assert notes.warnings == ["round 1: client 1 is left out (failed): its worker process died"]
    assert "no reply from its worker in train" in (path / "log.txt").read_text()


def test_a_worker_refuses_other_rows_another_model_and_another_version() -> None:
    config = tiny_config(*RAY)
    prepared = prepare(config, Silent())
    app = WorkerApp(prepared.config, prepared.budgets, identity(prepared, split(prepared, keeping=True)))
    app(lambda *_: None)
    for change, message in (
        ({"identity": replace(app.identity, rows="0" * 32)}, "has other rows or another base model than the server"),
        ({"identity": replace(app.identity, base="other")}, "has other rows or another base model than the server"),
        ({"version": "0.0.1"}, "the server 0.0.1; install the same"),
    ):
        with pytest.raises(UserError, match=message):
            replace(app, **change)(lambda *_: None)  # type: ignore[arg-type]


def command(out: Path, *settings: str) -> tuple[int, str]:
    """Exit code and error output of `hfedmoe run` with a tiny config."""
    sets = [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run(
        [sys.executable, "-m", "hfedmoe", "run", "configs/tiny.toml", *sets, "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    return done.returncode, done.stderr


@with_ray
def test_a_wrong_address_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    code, said = command(tmp_path / "run", "carrier.kind=ray", "carrier.address=127.0.0.1:1")
    assert code == 2
    assert said.splitlines()[-1:] == [
        "error: carrier.address = 127.0.0.1:1: no Ray cluster answers there (Connection refused); start one with `ray "
        "start --head`, or leave the address out to start Ray on this machine"
    ]
    assert not (tmp_path / "run").exists()


def test_without_ray_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "ray" else known(name, *more))
    with pytest.raises(UserError, match=r'^carrier.kind = "ray" needs Ray: pip install "hfedmoe\[ray\]"$'):
        run(tiny_config(*RAY), tmp_path / "run", Silent())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["carrier.clients_at_once=2"], r'clients_at_once is about the workers of Ray; set carrier.kind = "ray"'),
        ([*RAY, "model.device=cuda"], "Ray gives GPUs to its workers; set carrier.gpus_per_client"),
        ([*RAY, "model.device=cuda:1", "carrier.gpus_per_client=1"], "Ray gives GPUs to its workers"),
        ([*RAY, "carrier.cpus_per_client=0"], "carrier.cpus_per_client"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(*settings)


def test_a_server_of_devices_says_that_it_ignores_the_carrier() -> None:
    prepared = prepare(tiny_config(*RAY), Silent())
    for base, warnings in (("", []), ("digest", ['carrier.kind = "ray" is ignored: the clients are devices'])):
        notes = Notes()
        server_for(prepared, Keeper(None), notes, digests=Digests(base))
        assert notes.warnings == warnings


def test_the_carrier_does_not_make_another_cell_of_a_comparison() -> None:
    here, there = (Cell("hfedmoe", 0, tiny_config(*more)) for more in ((), RAY))
    assert here.digest == there.digest


def test_a_share_of_a_gpu_is_a_valid_setting() -> None:
    config: RunConfig = tiny_config(*RAY, "model.device=cuda", "carrier.gpus_per_client=0.25")
    assert config.carrier.gpus_per_client == 0.25
