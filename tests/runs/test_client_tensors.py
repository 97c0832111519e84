"""What clients remember, in checkpoints that link what did not change."""

import pytest
import torch

from hfedmoe.errors import UserError
from tests.runs.writing import tensors


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
    with pytest.raises(UserError, match=r"round-0002: damaged during the run \(clients-0001.*`hfedmoe resume .*run`"):
        run.save_checkpoint(3, tensors(3), {}, client_tensors(3, "a", "b"), since=2)  # more than half is out of date
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == ["round-0001", "round-0002"]
