"""What is left of a run after kills and full disks."""

import logging
import os
import random
import signal
import time

import pytest
import torch

from hfedmoe.config import RunConfig
from hfedmoe.errors import UserError
from hfedmoe.files.disk import SERVED
from hfedmoe.runs.folder import RunFolder
from tests.runs.conftest import CONFIG
from tests.runs.writing import child, tensors

WRITER = """
import os, sys, torch
from pathlib import Path
from hfedmoe.runs.folder import RunFolder

def write():
    run = RunFolder.open(Path(sys.argv[1]), to_write=True)
    start = run.load_checkpoint().round if run.saved_rounds() else 0
    run.rewind(start)
    print(os.getpid(), flush=True)
    for round in range(start + 1, 10_000):
        with run.expert_rows(round, [2]) as add:
            add(0, [round, round], [0, 0], [1, 1], [1, 0])
        run.append_round({"round": round})
        tensors = {str(i): torch.full((200_000,), float(round)) for i in range(3)}
        clients = {"0": torch.full((1000,), float(round), dtype=torch.bfloat16)}
        run.save_checkpoint(round, tensors, {"round": round}, clients, score=-abs(round - 5))

for line in sys.stdin:  # a fresh process for every kill, without importing torch every time
    if not (writer := os.fork()):
        write()
    os.waitpid(writer, 0)
    print("killed", flush=True)
"""


def test_killed_at_any_moment_a_whole_checkpoint_is_left(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    RunFolder.create(tmp_path / "run", RunConfig(keep_checkpoints=1)).close()
    dice, before = random.Random(0), 0
    with child(WRITER, tmp_path / "run") as process:
        for _ in range(12):
            process.stdin.write("go\n")
            process.stdin.flush()
            writer = int(process.stdout.readline())
            time.sleep(0.2 * dice.random())
            os.kill(writer, signal.SIGKILL)
            assert process.stdout.readline() == "killed\n"
            with RunFolder.open(tmp_path / "run", to_write=True) as run:
                if before or run.saved_rounds():
                    before = check_whole(run, before)
    assert before > 0
    assert "damaged" not in caplog.text


def check_whole(run, before):
    """All parts of a run that was killed agree on one round, not earlier than `before`; return it."""
    got = run.load_checkpoint("last")
    run.rewind(got.round)
    assert got.round >= before
    assert got.state == {"round": got.round}
    values = torch.cat([*got.tensors.values(), got.clients["0"].float()])
    assert values.unique().tolist() == [got.round]
    assert [record["round"] for record in run.read_rounds()] == list(range(1, got.round + 1))
    assert run.read_expert_rows()["round"].tolist() == list(range(1, got.round + 1))
    assert run.load_checkpoint("best").round == min(got.round, 5)
    return got.round


SMALL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from hfedmoe.errors import UserError
from hfedmoe.runs.folder import RunFolder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
run = RunFolder.open(Path(sys.argv[1]), to_write=True)


def append_experts(round, clients):
    with run.expert_rows(round, [2]) as add:
        for client in range(clients):
            add(client, [1, 2], [0, 0], [1, 1], [1, 0])

append_experts(1, 1)
run.append_round({"round": 1})
run.save_checkpoint(1, {"a": torch.ones(10)}, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
for write in (
    lambda: run.save_checkpoint(2, {"a": torch.ones(100_000)}, {}),
    lambda: run.save_checkpoint(2, {"a": torch.ones(10)}, {"big": "x" * 5000}),
    lambda: run.append_round({"round": 2, "big": "x" * 5000}),
    lambda: append_experts(2, 2000),
):
    try:
        write()
    except UserError as error:
        print(error)
"""


@pytest.mark.parametrize("command", ["hfedmoe resume", "hfedmoe serve --resume"])
def test_a_full_disk_is_a_user_error_and_harms_nothing(run, command):
    run.close()
    if command != "hfedmoe resume":  # devices are part of it
        (run.path / SERVED).write_text("{}")
    with child(SMALL_DISK, run.path) as process:
        out, err = process.communicate(timeout=120)
    assert err == ""
    names = ["checkpoints", "checkpoints", "metrics.jsonl", "experts.npy"]
    assert out.splitlines() == [
        f"{run.path / name}: cannot be written (File too large); "
        f"free some space, then `{command} {run.path}`"
        for name in names
    ]  # fmt: skip
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["round-0001"]
    assert run.load_checkpoint().tensors["a"].sum() == 10
    assert run.read_rounds() == [{"round": 1}]
    assert run.read_expert_rows()["round"].tolist() == [1]
    assert not list(run.path.glob(".tmp-*"))


def test_no_space_left_on_a_real_disk(tiny_disk):
    with RunFolder.create(tiny_disk / "run", CONFIG) as run:
        run.save_checkpoint(1, tensors(1), {})
        big = {"a": torch.ones(100_000)}
        with pytest.raises(UserError, match=r"No space left on device\); free some space, then `hfedmoe resume"):
            run.save_checkpoint(2, big, {})
        assert run.load_checkpoint().round == 1
        run.append_round({"round": 1})
        with pytest.raises(UserError, match="No space left"):
            run.append_round({"round": 2, "big": "x" * 500_000})
        assert run.read_rounds() == [{"round": 1}]
        run.save_checkpoint(2, tensors(2), {})
        assert run.load_checkpoint().round == 2


def test_a_folder_that_vanished_is_a_user_error(run):
    (run.path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written \(Is a directory\); make it writable"):
        run.append_round({"round": 1})
