"""A run killed at any moment and resumed ends with the weights of a run that was left alone, bit for bit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hfedmoe.errors import UserError
from hfedmoe.experiment import evaluate_run, resume
from hfedmoe.report.live import Silent
from hfedmoe.runs import RunFolder

CHILD = """
import os, signal, sys
from pathlib import Path
from hfedmoe.experiment import resume, run
from hfedmoe.report.live import Silent
from tests.federation.conftest import tiny_config

class Killer(Silent):
    def __init__(self, moment): self.moment = moment
    def _at(self, *moment):
        if " ".join(map(str, moment)) == self.moment: os.kill(os.getpid(), signal.SIGKILL)
    def client_started(self, round, client, steps): self._at("client", round, client)
    def step(self, client, step, steps, loss): self._at("step", client, step)
    def round_done(self, round, *_): self._at("done", round)
    def evaluated(self, round, *_): self._at("evaluated", round)

out, moment = Path(sys.argv[1]), sys.argv[2]
if (out / "config.toml").exists():
    resume(out, Killer(moment))
else:
    run(tiny_config("federation.rounds=3", "method.score=taylor", "method.gate=rows"), out, Killer(moment))
"""


def child(out: Path, moment: str) -> int:
    done = subprocess.run([sys.executable, "-c", CHILD, str(out), moment], capture_output=True, text=True, check=False)
    assert done.returncode in (0, -9), done.stderr
    return done.returncode


def test_killed_and_resumed_runs_end_with_the_same_bits(tmp_path: Path) -> None:
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
    history = killed.read_experts()
    assert history is not None
    assert list(history.rounds) == [1, 2, 3]
    best = evaluate_run(tmp_path / "killed", "best", Silent())
    assert best == evaluate_run(tmp_path / "whole", "best", Silent())


def test_a_finished_run_resumes_to_itself_and_bad_requests_are_refused(tmp_path: Path) -> None:
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
