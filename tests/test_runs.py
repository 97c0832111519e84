"""The run folder: round trips, and what is left after kills, full disks and damage."""

import contextlib
import errno
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfedmoe.config import ClientsConfig, DataConfig, RunConfig, TrainConfig
from hfedmoe.errors import UserError
from hfedmoe.runs import RunFolder, experts, read_run_config

CONFIG = RunConfig(keep_checkpoints=2)


@pytest.fixture
def run(tmp_path):
    with RunFolder.create(tmp_path / "run", CONFIG) as folder:
        yield folder


def tensors(round: int) -> dict[str, torch.Tensor]:
    return {"a": torch.full((4, 3), float(round)), "b": torch.arange(5) + round}


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def child(code: str, *arguments: object) -> subprocess.Popen:
    """A Python process that talks with the test line by line."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# config.toml


def test_config_round_trip_with_versions_and_seed(run):
    assert RunFolder.open(run.path).config == CONFIG
    tree = tomllib.loads((run.path / "config.toml").read_text())
    assert tree["seed"] == 0
    assert set(tree["versions"]) == {"python", "torch", "transformers", "peft", "flwr", "hfedmoe"}


def test_none_is_kept_where_the_default_is_not_none(tmp_path):
    config = RunConfig(data=DataConfig(test_rows=None), train=TrainConfig(max_grad_norm=None))
    RunFolder.create(tmp_path / "run", config).close()
    assert (
        'unset = [\n    "data.test_rows",\n    "train.max_grad_norm",\n]' in (tmp_path / "run/config.toml").read_text()
    )
    assert read_run_config(tmp_path / "run/config.toml") == config


@given(
    words=st.none() | st.dictionaries(st.text(min_size=1), st.text(), max_size=3),
    lr=st.floats(min_value=1e-12, max_value=1e3),
    budgets=st.lists(st.integers(1, 99) | st.sampled_from(["25%", "12.5 %"]), min_size=1, max_size=4),
    rows=st.none() | st.integers(1, 10**9),
)
@settings(max_examples=30, deadline=None)
def test_any_config_comes_back(words, lr, budgets, rows):
    config = RunConfig(
        data=DataConfig(label_words=words, test_rows=rows, train_rows=rows),
        train=TrainConfig(lr=lr),
        clients=ClientsConfig(budgets=budgets),
    )
    with tempfile.TemporaryDirectory() as folder:
        RunFolder.create(Path(folder, "run"), config).close()
        assert RunFolder.open(Path(folder, "run")).config == config


def test_other_versions_are_a_warning(run, caplog):
    path = run.path / "config.toml"
    path.write_text(
        path.read_text().replace("[versions]\n", '[versions]\nold = "1"\n').replace("flwr = ", 'flwr = "0"#')
    )
    assert read_run_config(path) == CONFIG
    assert "old 1 (here none), flwr 0 (here" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a run folder"),
        ("a = = 1", "not valid TOML"),
        ("\xff", "not valid TOML"),
        ("seed = -1", "seed: "),
        ("sead = 1", "sead: unknown key; did you mean seed?"),
        ('unset = ["seed.x"]\nseed = 1', "seed is not a section"),
    ],
)
def test_open_refuses_what_is_not_a_run(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.toml").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message) as caught:
        RunFolder.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_open_refuses_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        RunFolder.open(tmp_path / "none")


# create


def test_create_names_by_date_and_counts_up(tmp_path):
    names = []
    for _ in range(3):
        with RunFolder.create(None, CONFIG, root=tmp_path / "runs") as folder:
            names.append(folder.path.name)
    assert names[0].endswith("-r8-hfedmoe")
    assert names[1:] == [names[0] + "-2", names[0] + "-3"]


def test_create_takes_an_empty_folder_and_what_a_failed_start_left(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".tmp-config.toml").touch()
    RunFolder.create(tmp_path, CONFIG).close()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "config.toml"]


def test_create_refuses_a_run_other_files_and_a_file(run, tmp_path):
    with pytest.raises(UserError, match=r"holds a run already; choose another --out, or `hfedmoe resume .*run`"):
        RunFolder.create(run.path, CONFIG)
    (tmp_path / "note").touch()
    with pytest.raises(UserError, match=r"not empty \(note\); choose another --out"):
        RunFolder.create(tmp_path, CONFIG)
    assert not (tmp_path / ".lock").exists()
    with pytest.raises(UserError, match="is a file"):
        RunFolder.create(tmp_path / "note", CONFIG)


@pytest.mark.parametrize("below", ["note/run", "note/deep/run"])
def test_create_below_a_file_is_a_user_error(tmp_path, below):
    (tmp_path / "note").touch()
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder.create(tmp_path / below, CONFIG)
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder.create(None, CONFIG, root=tmp_path / below)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_create_in_an_unwritable_place_is_a_user_error():
    with pytest.raises(UserError, match=r"/proc/run: cannot be written .*choose another --out"):
        RunFolder.create(Path("/proc/run"), CONFIG)


# the lock


def test_only_one_writer_but_many_readers(run):
    with pytest.raises(UserError, match="another process is working on this run"):
        RunFolder.open(run.path, to_write=True)
    assert RunFolder.open(run.path).read_rounds() == []
    run.close()
    RunFolder.open(run.path, to_write=True).close()


def test_the_lock_dies_with_its_process(run):
    run.close()
    code = """
import sys, time
from pathlib import Path
from hfedmoe.runs import RunFolder
run = RunFolder.open(Path(sys.argv[1]), to_write=True)
print("locked", flush=True)
time.sleep(60)
"""
    with child(code, run.path) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="another process"):
            RunFolder.open(run.path, to_write=True)
        process.kill()
        process.wait()
    RunFolder.open(run.path, to_write=True).close()


def test_a_reader_cannot_write(run):
    with pytest.raises(AssertionError):
        RunFolder.open(run.path).append_round({"round": 1})


# metrics.jsonl


def test_rounds_round_trip_as_valid_json(run):
    run.append_round({"round": 1, "loss": float("nan"), "clients": [{"loss": float("-inf"), "name": "Zoë"}]})
    run.append_round({"round": 2, "loss": 0.1})
    lines = (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == run.read_rounds()
    assert run.read_rounds() == [
        {"round": 1, "loss": None, "clients": [{"loss": None, "name": "Zoë"}]},
        {"round": 2, "loss": 0.1},
    ]


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_torn_last_line_is_not_read_and_then_cut_off(run, cut):
    run.append_round({"round": 1})
    run.append_round({"round": 2})
    path = run.path / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - cut)
    assert run.read_rounds() == [{"round": 1}]
    run.append_round({"round": 2, "again": True})
    assert run.read_rounds() == [{"round": 1}, {"round": 2, "again": True}]


def test_a_damaged_line_is_left_out_with_a_warning(run, caplog):
    (run.path / "metrics.jsonl").write_bytes(b'{"round": 1}\n\0\0\0\n{"round": 3}\n')
    assert [record["round"] for record in run.read_rounds()] == [1, 3]
    assert "line 2 is damaged" in caplog.text


# experts.npy


def append_experts(run, round, num_experts, clients, *vectors):
    """A round of experts.npy in one call."""
    with run.expert_rows(round, num_experts) as add:
        for row in zip(clients, *vectors, strict=True):
            add(*row)


def test_experts_pad_layers_and_absent_clients(run):
    assert run.read_experts() is None
    append_experts(run, 1, [2, 1], [4], [[0.1, 0.2, 0.3]], [[1, 2, 3]], [[True, False, True]], [[True, False, False]])
    usage = torch.tensor([[0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])
    append_experts(run, 2, [2, 1], [9, 0], usage, usage, usage > 0, list(usage > 0.6))
    history = run.read_experts()
    assert history.rounds.tolist() == [1, 2]
    assert history.clients.tolist() == [0, 4, 9]
    assert history.num_experts.tolist() == [2, 1]
    nan = np.nan
    expected = np.full((2, 3, 2, 2), nan, np.float32)
    expected[0, 1] = [[0.1, 0.2], [0.3, nan]]
    expected[1, 2] = [[0.4, 0.5], [0.6, nan]]
    expected[1, 0] = [[0.7, 0.8], [0.9, nan]]
    np.testing.assert_array_equal(history.usage, expected)
    assert history.usage.dtype == np.float32
    np.testing.assert_array_equal(history.resident[0, 1], [[True, False], [True, False]])
    np.testing.assert_array_equal(history.resident[0, 0], [[False, False], [False, False]])
    np.testing.assert_array_equal(history.trained[1, 0], [[True, True], [True, False]])


def test_experts_of_the_same_round_are_replaced(run):
    for value in (1.0, 2.0):
        append_experts(run, 1, [1], [0], [[value]], [[value]], [[True]], [[True]])
    assert run.read_experts().usage.tolist() == [[[[2.0]]]]


@pytest.mark.parametrize("cut", [0, 3, 40, -40, -1])
def test_damaged_experts_are_a_user_error_unless_no_row_is_needed(run, cut):
    append_experts(run, 1, [2], [0, 1], *[[[1, 2]] * 2] * 2, *[[[1, 0]] * 2] * 2)
    path = run.path / "experts.npy"
    path.write_bytes(path.read_bytes()[:cut])
    for use in (run.read_experts, lambda: run.rewind(1), lambda: append_experts(run, 2, [2], [])):
        with pytest.raises(
            UserError, match=r'experts.npy: damaged .* resume the run, .*"prior".*--as client'
        ) as caught:
            use()
        assert "\n" not in str(caught.value)
    run.rewind(0)
    assert run.read_experts() is None


@pytest.mark.parametrize("table", [np.zeros(3), np.zeros((2, 2)), np.zeros(2, [("round", int)])])
def test_another_table_in_the_place_of_the_experts_is_refused(run, table):
    np.save(run.path / "experts.npy", table)
    with pytest.raises(UserError, match=r"experts.npy: damaged \(its header is that of another table\)"):
        run.read_experts()


def test_experts_can_be_read_while_their_first_round_goes_on(run):
    with run.expert_rows(1, [2]) as add:
        assert len(np.load(run.path / "experts.npy")) == 0
        add(0, [1, 2], [0, 0], [1, 1], [1, 0])
        assert run.read_experts().usage.shape == (0, 0, 1, 2)


@pytest.mark.parametrize("which", [1, 2])
def test_a_commit_that_fails_leaves_the_rows_before_it(run, monkeypatch, which):
    append_experts(run, 1, [2], [0], [[1, 2]], [[0, 0]], [[1, 1]], [[1, 0]])
    before, calls = (run.path / "experts.npy").read_bytes(), iter([1, 2])

    def fail(file):
        file.flush()
        if next(calls) == which:  # the second one comes after the header was written
            raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(experts, "sync", fail)
        with pytest.raises(UserError, match=r"experts.npy: cannot be written \(broken\)"):
            append_experts(run, 2, [2], [0], [[3, 4]], [[0, 0]], [[1, 1]], [[1, 0]])
    assert (run.path / "experts.npy").read_bytes() == before


def test_what_fails_elsewhere_is_not_blamed_on_the_experts(run):
    with pytest.raises(ConnectionResetError), run.expert_rows(1, [2]):
        raise ConnectionResetError


# checkpoints


def test_checkpoint_comes_back_bit_for_bit(run):
    payload = torch.tensor([0x7FC12345, -0x400001, 0x3F800000], dtype=torch.int32).view(torch.float32)  # NaN payloads
    half = torch.tensor([0x7FC1, 0x3F80, -1], dtype=torch.int16).view(torch.bfloat16)
    base = torch.arange(12.0).reshape(3, 4)
    sent = {
        "nan": payload,
        "bf16": half,
        "transposed": base.T,
        "tied": base,
        "tied_too": base,
        "slice": base[1:, 1:],
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3),
        "grad": torch.ones(2, requires_grad=True),
        "flags": torch.tensor([True, False]),
    }
    state = {"rng": [1, 2], "history": {"x": 0.1 + 0.2}, "loss": float("inf"), "none": None}
    path = run.save_checkpoint(3, sent, state, clients={"0.half": half}, score=0.5)
    got = run.load_checkpoint()
    assert (got.round, got.state, got.score, got.path) == (3, state, 0.5, path)
    assert got.tensors.keys() == sent.keys()
    for name, tensor in {**sent, "clients": half}.items():
        back = got.clients["0.half"] if name == "clients" else got.tensors[name]
        assert back.dtype == tensor.dtype
        assert back.shape == tensor.shape
        assert torch.equal(raw(back), raw(tensor))
    got.tensors["tied"].zero_()  # ours alone: not the file, not its twin
    assert got.tensors["tied_too"].sum() == 66
    assert run.load_checkpoint().tensors["tied"].sum() == 66


def test_a_checkpoint_without_client_tensors_has_none(run):
    run.save_checkpoint(0, {}, {})
    got = run.load_checkpoint(0)
    assert (got.tensors, got.clients, got.score) == ({}, None, None)


def test_files_follow_the_umask(run):
    path = run.save_checkpoint(1, tensors(1), {})
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {path.stat().st_mode & 0o666}


def test_the_newest_and_the_best_are_kept(run):
    for round, score in enumerate([0.1, 0.9, 0.3, float("nan"), None, 0.2], start=1):
        run.save_checkpoint(round, tensors(round), {}, score=score, metric="macro_f1")
    assert run.saved_rounds() == [2, 5, 6]
    assert run.load_checkpoint("best").round == 2
    assert run.load_checkpoint("last").round == 6
    assert json.loads((run.path / "best.json").read_text()) == {
        "round": 2,
        "metric": "macro_f1",
        "score": 0.9,
        "checkpoint": "checkpoints/round-0002",
    }


def test_of_equal_scores_the_newest_is_best(run):
    for round in (1, 2):
        run.save_checkpoint(round, tensors(round), {}, score=0.5)
    assert run.load_checkpoint("best").round == 2


def test_saving_a_round_again_replaces_it(run):
    run.save_checkpoint(1, tensors(1), {"try": 1})
    run.save_checkpoint(1, tensors(2), {"try": 2})
    assert run.load_checkpoint(1).state == {"try": 2}
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["round-0001"]


def test_asking_for_what_is_not_there(run):
    with pytest.raises(UserError, match="no checkpoint yet"):
        run.load_checkpoint()
    run.save_checkpoint(1, tensors(1), {})
    with pytest.raises(UserError, match="no checkpoint of round 7; there are rounds 1"):
        run.load_checkpoint(7)
    with pytest.raises(UserError, match="has a score"):
        run.load_checkpoint("best")


def cut(path):
    os.truncate(path / "model.safetensors", 40)


def flip(path):
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)


def lose_tensors(path):
    (path / "model.safetensors").unlink()


def lose_state(path):
    (path / "state.json").unlink()


def cut_state(path):
    os.truncate(path / "state.json", 20)


def odd_state(path):
    (path / "state.json").write_text('{"round": 2, "score": 1, "metric": "", "files": [], "state": {}}')


@pytest.mark.parametrize("harm", [cut, flip, lose_tensors, lose_state, cut_state, odd_state])
def test_a_damaged_checkpoint_is_passed_over(run, harm, caplog):
    run.save_checkpoint(1, tensors(1), {}, score=0.1)
    harm(run.save_checkpoint(2, tensors(2), {}, score=0.2))
    assert run.load_checkpoint("last").round == 1
    assert "round-0002 is damaged" in caplog.text
    assert run.load_checkpoint("best").round == 1
    with pytest.raises(UserError, match="round-0002: damaged"):
        run.load_checkpoint(2)
    harm(run.path / "checkpoints/round-0001")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        run.load_checkpoint("last")


def test_a_checkpoint_cut_short_does_not_push_out_a_whole_one(run):
    run.save_checkpoint(1, tensors(1), {})
    cut(run.save_checkpoint(2, tensors(2), {}))
    run.save_checkpoint(3, tensors(3), {})
    assert run.saved_rounds() == [1, 3]


def test_leftovers_are_ignored_and_cleaned(run):
    run.save_checkpoint(1, tensors(1), {})
    leftover = run.path / "checkpoints/.tmp-round-0002"
    leftover.mkdir()
    (leftover / "model.safetensors").touch()
    assert run.load_checkpoint().round == 1
    run.save_checkpoint(2, tensors(2), {})
    assert not leftover.exists()


def test_rewind_drops_what_is_later(run):
    for round in (1, 2, 3):
        append_experts(run, round, [1], [0], [[round]], [[round]], [[True]], [[True]])
        run.append_round({"round": round})
        run.save_checkpoint(round, tensors(round), {}, score=round / 10)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 4')
    run.rewind(2)
    assert run.saved_rounds() == [2]
    assert run.load_checkpoint("best").round == 2
    assert json.loads((run.path / "best.json").read_text())["round"] == 2
    assert (run.path / "metrics.jsonl").read_text() == '{"round": 1}\n{"round": 2}\n'
    assert run.read_experts().usage.ravel().tolist() == [1, 2]
    run.rewind(0)
    assert run.saved_rounds() == []
    assert run.read_rounds() == []
    assert run.read_experts() is None
    assert not (run.path / "best.json").exists()


def test_rewind_of_a_run_without_records_does_nothing(run):
    run.rewind(0)
    assert sorted(p.name for p in run.path.iterdir()) == [".lock", "config.toml"]


# kills and full disks

WRITER = """
import os, sys, torch
from pathlib import Path
from hfedmoe.runs import RunFolder

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
    assert run.read_experts().rounds.tolist() == list(range(1, got.round + 1))
    assert run.load_checkpoint("best").round == min(got.round, 5)
    return got.round


SMALL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from hfedmoe.errors import UserError
from hfedmoe.runs import RunFolder
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


def test_a_full_disk_is_a_user_error_and_harms_nothing(run):
    run.close()
    with child(SMALL_DISK, run.path) as process:
        out, err = process.communicate(timeout=120)
    assert err == ""
    names = ["checkpoints", "checkpoints", "metrics.jsonl", "experts.npy"]
    assert out.splitlines() == [
        f"{run.path / name}: cannot be written (File too large); "
        f"free some space, then `hfedmoe resume {run.path}`"
        for name in names
    ]  # fmt: skip
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["round-0001"]
    assert run.load_checkpoint().tensors["a"].sum() == 10
    assert run.read_rounds() == [{"round": 1}]
    assert run.read_experts().rounds.tolist() == [1]
    assert not list(run.path.glob(".tmp-*"))


@pytest.fixture
def tiny_disk(tmp_path):
    """A real file system of 256 KiB; only root can mount one."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)]
    mounted = False
    with contextlib.suppress(OSError):
        mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("mounting a file system is not allowed here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


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


def test_importing_is_cheap():
    code = "import sys, hfedmoe.runs; print(sorted({'torch', 'safetensors', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# clients of a checkpoint


def client_tensors(round: int, *names: str) -> dict[str, torch.Tensor]:
    return {name: torch.full((2,), float(round)) for name in names}


def values(checkpoint) -> dict[str, float]:
    return {name: tensor[0].item() for name, tensor in sorted(checkpoint.clients.items())}


def test_a_checkpoint_links_what_its_clients_did_not_change(run):
    run.save_checkpoint(0, tensors(0), {}, {})
    run.save_checkpoint(1, tensors(1), {}, client_tensors(1, "a", "b", "c"), since=0)
    run.save_checkpoint(2, tensors(2), {}, client_tensors(2, "b"), since=1)
    run.save_checkpoint(3, tensors(3), {}, client_tensors(3, "d"), since=2)
    assert run.saved_rounds() == [2, 3]  # the files of round 1 are gone from there, and still linked
    assert values(run.load_checkpoint(2)) == {"a": 1, "b": 2, "c": 1}
    assert values(run.load_checkpoint(3)) == {"a": 1, "b": 2, "c": 1, "d": 3}
    names = sorted(path.name for path in (run.path / "checkpoints/round-0003").glob("clients*"))
    assert names == ["clients-0001.safetensors", "clients-0002.safetensors", "clients.safetensors"]


def test_what_is_out_of_date_is_not_linked_for_ever(run):
    run.save_checkpoint(1, tensors(1), {}, client_tensors(1, "a", "b"))
    for round in range(2, 30):
        run.save_checkpoint(round, tensors(round), {}, client_tensors(round, "a"), since=round - 1)
        assert values(run.load_checkpoint(round)) == {"a": round, "b": 1}
        assert len(list((run.path / f"checkpoints/round-{round:04d}").glob("clients*"))) <= 3
    run.save_checkpoint(30, tensors(30), {}, client_tensors(30, "a", "b"), since=29)
    assert [path.name for path in (run.path / "checkpoints/round-0030").glob("clients*")] == ["clients.safetensors"]


def test_a_damaged_link_is_noticed(run):
    run.save_checkpoint(1, tensors(1), {}, client_tensors(1, "a"))
    run.save_checkpoint(2, tensors(2), {}, client_tensors(2, "b"), since=1)
    path = run.path / "checkpoints/round-0002/clients-0001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match=r"clients-0001.safetensors has another checksum"):
        run.load_checkpoint(2)


@pytest.mark.parametrize("place", [0, -1])
def test_damage_is_not_written_anew_with_a_sum_of_its_own(run, place):
    run.save_checkpoint(1, tensors(1), {}, client_tensors(1, "a", "b", "c", "d"))
    run.save_checkpoint(2, tensors(2), {}, client_tensors(2, "a", "b", "c"), since=1)
    path = run.path / "checkpoints/round-0002/clients-0001.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        UserError, match=r"round-0002: damaged while the run went on \(clients-0001.*`hfedmoe resume .*run`"
    ):
        run.save_checkpoint(3, tensors(3), {}, client_tensors(3, "a", "b"), since=2)  # more than half is out of date
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == ["round-0001", "round-0002"]


# rows that come one by one


def test_expert_rows_of_a_round_that_fails_are_forgotten(run):
    append_experts(run, 1, [2], [0], [[1, 2]], [[0, 0]], [[1, 1]], [[1, 0]])
    before = (run.path / "experts.npy").read_bytes()

    def fail() -> None:
        with run.expert_rows(2, [2]) as add:
            add(0, [1, 2], [0, 0], [1, 1], [1, 0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (run.path / "experts.npy").read_bytes() == before
    rows = np.load(run.path / "experts.npy")
    assert rows["usage"].tolist() == [[[1, 2]]]


def test_clients_of_a_line_may_come_one_by_one(run):
    run.append_round({"round": 1, "loss": float("nan")}, iter([{"client": 0}, {"client": 1, "x": None}]))
    run.append_round({"round": 2}, iter([]))
    assert run.read_rounds() == [
        {"round": 1, "loss": None, "clients": [{"client": 0}, {"client": 1, "x": None}]},
        {"round": 2, "clients": []},
    ]
