"""Thousands of registered clients, of which a round draws a few: what is kept, written and shown is of those few."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from hfedmoe.events import Silent
from hfedmoe.report.live import Live
from hfedmoe.runs.folder import RunFolder
from hfedmoe.simulation import resume, run
from tests.federation import tiny_config

CLIENTS, DRAWN = 2000, 5
MANY = [
    f"clients.count={CLIENTS}",
    f"federation.clients_per_round={DRAWN}",
    "federation.rounds=3",
    "train.steps=1",
    "data.train_rows=4000",
    "partition.scheme=iid",
    "partition.min_rows=1",
    "keep_checkpoints=1",
]


class Stopped(Exception):
    """The run was ended from outside."""


class StopInRound2(Silent):
    def round_started(self, round: int) -> None:
        if round == 2:
            raise Stopped


def test_two_thousand_registered_clients_cost_what_five_do_and_resume_bit_for_bit(tmp_path: Path) -> None:
    out = io.StringIO()
    run(tiny_config(*MANY), tmp_path / "whole", Live(Console(file=out)))
    with pytest.raises(Stopped):
        run(tiny_config(*MANY), tmp_path / "stopped", StopInRound2())
    resume(tmp_path / "stopped", Silent())
    whole, stopped = (RunFolder.open(tmp_path / name) for name in ("whole", "stopped"))
    one, other = whole.load_checkpoint("last"), stopped.load_checkpoint("last")
    assert one.round == other.round == 3
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    assert one.clients is not None
    assert other.clients is not None
    assert one.clients.keys() == other.clients.keys()
    assert all(torch.equal(tensor, other.clients[name]) for name, tensor in one.clients.items())

    drawn = [{row["client"] for row in line["clients"]} for line in whole.read_rounds()[1:]]
    assert [len(clients) for clients in drawn] == [DRAWN] * 3
    assert {int(name.split("/")[0]) - 1 for name in one.clients} == set.union(*drawn)
    rows = np.load(tmp_path / "whole" / "experts.npy", mmap_mode="r")
    assert len(rows) == 3 * DRAWN
    assert [set(rows["client"][rows["round"] == round]) for round in (1, 2, 3)] == drawn
    # A checkpoint writes the clients of its round; those of earlier rounds are links, which outlive the deleted ones.
    last = tmp_path / "whole" / "checkpoints" / "round-0003"
    sizes = {path.name: path.stat().st_size for path in last.glob("clients*")}
    assert set(sizes) == {"clients.safetensors", "clients-0001.safetensors", "clients-0002.safetensors"}
    assert max(sizes.values()) < 1.1 * min(sizes.values())
    # Nor does the screen list two thousand clients.
    assert len(out.getvalue().splitlines()) < 60
