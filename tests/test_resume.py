"""A run killed at any moment and resumed ends with the weights of a run that was left alone, bit for bit."""

import errno
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
import torch

from hfedmoe.errors import UserError
from hfedmoe.events import Silent
from hfedmoe.measure import evaluate_run
from hfedmoe.runs import experts
from hfedmoe.runs.folder import RunFolder
from hfedmoe.simulation import resume, run
from tests.federation import StopAt, Stopped, tiny_config

STARTER = """
import os, signal, sys
from pathlib import Path
from hfedmoe.prepare import prepare
from hfedmoe.simulated import split
from hfedmoe.simulation import resume, run
from hfedmoe.events import Silent
from tests.federation import tiny_config

class Killer(Silent):
    def __init__(self, moment): self.moment = moment
    def _at(self, *moment):
        if " ".join(map(str, moment)) == self.moment: os.kill(os.getpid(), signal.SIGKILL)
    def client_started(self, round, client, steps): self._at("client", round, client)
    def step(self, client, step, steps, loss): self._at("step", client, step)
    def round_done(self, round, *_): self._at("done", round)
    def evaluated(self, evaluation): self._at("evaluated", evaluation.round)

def work(out, moment):
    if (out / "config.toml").exists():
        resume(out, Killer(moment))
    else:
        more = ("method.score=taylor", "method.gate=rows", "evaluation.personal_every=2")
        run(tiny_config("federation.rounds=3", *more), out, Killer(moment))

split(prepare(tiny_config(), Silent()), keeping=True)  # imports what they all need
for line in sys.stdin:  # a process for each
    pid = os.fork()
    if not pid:
        out, moment = line.rstrip().split(" ", 1)
        work(Path(out), moment)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def child() -> Iterator[Callable[[Path, str], int]]:
    """Runs or resumes a run in a process of its own, to its end or to a moment; returns the exit code."""
    with subprocess.Popen(
        [sys.executable, "-c", STARTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as starter:
        assert starter.stdin is not None
        assert starter.stdout is not None

        def start(out: Path, moment: str) -> int:
            print(out, moment, file=starter.stdin, flush=True)
            code = int(starter.stdout.readline())
            assert code in (0, -9)
            return code

        yield start
        starter.stdin.close()


def test_killed_and_resumed_runs_end_with_the_same_bits(tmp_path: Path, child: Callable[[Path, str], int]) -> None:
    assert child(tmp_path / "whole", "never") == 0
    assert child(tmp_path / "killed", "client 1 2") == -9  # within round 1
    assert child(tmp_path / "killed", "done 1") == -9  # between rounds
    assert child(tmp_path / "killed", "evaluated 2") == -9  # after round 2 was folded, before it was written
    assert child(tmp_path / "killed", "client 3 3") == -9
    assert child(tmp_path / "killed", "never") == 0
    whole, killed = (RunFolder.open(tmp_path / name) for name in ("whole", "killed"))
    one, other = whole.load_checkpoint("last"), killed.load_checkpoint("last")
    assert one.round == other.round == 3
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name
    assert one.clients is not None
    assert other.clients is not None
    assert all(torch.equal(tensor, other.clients[name]) for name, tensor in one.clients.items())
    rounds = [[line["round"] for line in folder.read_rounds()] for folder in (whole, killed)]
    assert rounds == [[0, 1, 2, 3]] * 2
    own = [[line.get("personal") for line in folder.read_rounds()] for folder in (whole, killed)]
    assert own[0] == own[1]
    assert [bool(found) for found in own[0]] == [False, False, True, False]
    assert rounds_with_rows(tmp_path / "killed") == [1, 2, 3]
    best = evaluate_run(tmp_path / "killed", "best", Silent())
    assert best == evaluate_run(tmp_path / "whole", "best", Silent())


def test_a_finished_run_resumes_to_itself_and_bad_requests_are_refused(
    tmp_path: Path, child: Callable[[Path, str], int]
) -> None:
    assert child(tmp_path / "run", "never") == 0
    before = (tmp_path / "run" / "checkpoints" / "round-0003" / "model.safetensors").read_bytes()
    resume(tmp_path / "run", Silent())
    assert (tmp_path / "run" / "checkpoints" / "round-0003" / "model.safetensors").read_bytes() == before
    with pytest.raises(UserError, match="expected last, best"):
        evaluate_run(tmp_path / "run", "newest", Silent())
    with pytest.raises(UserError, match="9"):
        evaluate_run(tmp_path / "run", "9", Silent())
    with pytest.raises(UserError, match="nowhere"):
        resume(tmp_path / "nowhere", Silent())


# what became of experts.npy

QUICK = ("data.test_rows=6", "evaluation.watch_rows=1", "train.steps=1", "clients.count=2")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tiny_config(*QUICK), tmp_path_factory.mktemp("runs") / "whole", Silent())


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has only round 1."""
    path = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.raises(Stopped):
        run(tiny_config(*QUICK), path, StopAt(2))
    return path


def rounds_with_rows(path: Path) -> list[int]:
    rows = RunFolder.open(path).read_expert_rows()
    return [] if rows is None else sorted(set(rows["round"].tolist()))


def assert_same_weights(one: Path, other: Path) -> None:
    left, right = (RunFolder.open(path).load_checkpoint(2).tensors for path in (one, other))
    assert left.keys() == right.keys()
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


@pytest.mark.parametrize("length", [0, -5])
def test_a_run_goes_on_without_its_rows_if_they_are_damaged_and_deleted(
    whole: Path, stopped: Path, tmp_path: Path, length: int
) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    path = tmp_path / "run" / "experts.npy"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"experts.npy: damaged .*; restore it, or delete it and resume the run"):
        resume(tmp_path / "run", Silent())
    path.unlink()
    resume(tmp_path / "run", Silent())
    assert_same_weights(tmp_path / "run", whole)
    assert rounds_with_rows(tmp_path / "run") == [2]


def test_a_run_whose_clients_start_from_those_rows_does_not_go_on_without_them(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(tiny_config(*QUICK, "method.bootstrap=prior"), tmp_path / "run", StopAt(2))
    (tmp_path / "run" / "experts.npy").unlink()
    for _ in range(2):  # nor does asking again get around it
        with pytest.raises(UserError, match=r"no row of client 0 in round 1, which its method"):
            resume(tmp_path / "run", Silent())


def test_an_empty_file_of_rows_before_the_first_round_is_made_anew(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(tiny_config(*QUICK), tmp_path / "run", StopAt(1))
    (tmp_path / "run" / "experts.npy").touch()
    resume(tmp_path / "run", Silent())
    assert_same_weights(tmp_path / "run", whole)
    assert rounds_with_rows(tmp_path / "run") == [1, 2]


def test_a_run_that_could_not_commit_its_rows_goes_on_to_the_same_bits(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(1, 5))

    def full(file: IO[bytes]) -> None:
        file.flush()
        if next(calls) == 4:  # two for each round, the second after its header was written
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(experts, "sync", full)
        with pytest.raises(UserError, match=r"experts.npy: cannot be written \(No space left on device\); free some"):
            run(tiny_config(*QUICK), tmp_path / "run", Silent())
    assert rounds_with_rows(tmp_path / "run") == [1]
    resume(tmp_path / "run", Silent())
    assert_same_weights(tmp_path / "run", whole)
    assert rounds_with_rows(tmp_path / "run") == [1, 2]
