"""Checkpoints come back bit for bit, and damaged ones are passed over."""

import json
import os

import pytest
import torch

from hfedmoe.errors import UserError
from tests.runs.writing import append_experts, raw, tensors


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
    with pytest.raises(UserError, match="no undamaged checkpoint has a score; use --checkpoint last"):
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
    assert run.read_expert_rows()["usage"].ravel().tolist() == [1, 2]
    run.rewind(0)
    assert run.saved_rounds() == []
    assert run.read_rounds() == []
    assert run.read_expert_rows() is None
    assert not (run.path / "best.json").exists()


def test_rewind_of_a_run_without_records_does_nothing(run):
    run.rewind(0)
    assert sorted(p.name for p in run.path.iterdir()) == [".lock", "config.toml"]


@pytest.mark.parametrize("harm", [cut, flip, lose_tensors, lose_state])
def test_a_damaged_best_checkpoint_is_passed_over_with_a_warning(run, harm, caplog):
    run.save_checkpoint(1, tensors(1), {}, score=0.1)
    harm(run.save_checkpoint(2, tensors(2), {}, score=0.2))
    assert run.load_checkpoint("best").round == 1
    assert "round-0002 is damaged" in caplog.text
    harm(run.path / "checkpoints/round-0001")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        run.load_checkpoint("best")
