"""A base model's digest: the same wherever the same weights are, another where anything differs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hfedmoe.config import RunConfig, load_config
from hfedmoe.errors import UserError
from hfedmoe.files.lfs import START
from hfedmoe.models import digest
from hfedmoe.models.digest import base_digest, weights_digest
from hfedmoe.models.tiny import tiny_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model(64, 0).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def config(folder: Path, *overrides: str) -> RunConfig:
    return load_config(None, [f"model.name={folder}", *overrides])


def test_place_precision_and_how_experts_are_held_do_not_matter(folder: Path, tmp_path: Path) -> None:
    here = base_digest(config(folder))
    shutil.copytree(folder, tmp_path / "copy")
    assert base_digest(config(tmp_path / "copy")) == here
    assert base_digest(config(folder, "model.dtype=bfloat16", "model.expert_dtype=8bit", "train.lr=1e-4")) == here
    assert len(here) == 32


@pytest.mark.parametrize("change", ["seed=1", "train.rank=4", "train.lora=freeze_a", "model.upcycle={experts=4}"])
def test_what_fresh_weights_are_made_of_does(folder: Path, change: str) -> None:
    assert base_digest(config(folder, change)) != base_digest(config(folder))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.3.block_sparse_moe.experts.7.w3.weight"])
def test_another_value_of_the_same_shape_shows(folder: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(folder, tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    assert base_digest(config(tmp_path / "other")) != base_digest(config(folder))


def test_one_damaged_byte_shows_to_those_who_train_together(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    flat = tensors[name].view(-1)
    flat[len(flat) // 3] += 1  # neither at the beginning nor in the middle nor at the end
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    assert base_digest(config(tmp_path / "other")) != base_digest(config(folder))
    assert weights_digest(config(tmp_path / "other")) == weights_digest(config(folder))


def test_it_is_computed_once_until_a_file_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = base_digest(config(folder))
    monkeypatch.setattr(digest, "_of_tensors", lambda files, read: pytest.fail("computed again"))
    assert base_digest(config(folder)) == first
    tensors = {name: tensor + torch.ones(1) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        base_digest(config(folder))


def changed(folder: Path, **values: object) -> None:
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | values))


def rewritten(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = {name: change(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes"])
def test_quantised_weights_that_differ_have_another_digest(folder: Path, tmp_path: Path, method: str) -> None:
    changed(folder, quantization_config={"quant_method": method})
    if method == "fp8":
        rewritten(folder, lambda tensor: tensor.to(torch.float8_e4m3fn))
    shutil.copytree(folder, tmp_path / "copy")
    shutil.copytree(folder, tmp_path / "other")
    here = base_digest(config(folder))
    assert base_digest(config(tmp_path / "copy")) == here
    rewritten(tmp_path / "other", lambda tensor: (tensor.float() * 1.5).to(tensor.dtype))
    assert base_digest(config(tmp_path / "other")) != here


@pytest.mark.parametrize("sharded", [False, True])
def test_of_pickled_weights_only_what_transformers_loads_counts(folder: Path, sharded: bool) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = ["pytorch_model-00001-of-00001.bin"] if sharded else ["pytorch_model.bin"]
    torch.save(tensors, folder / parts[0])
    if sharded:
        places = dict.fromkeys(tensors, parts[0])
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    here = base_digest(config(folder))
    torch.save({1: 2}, folder / "training_args.bin")
    torch.save({1: 2}, folder / "optimizer.bin")
    assert base_digest(config(folder)) == here
    torch.save({name: tensor * 1.5 for name, tensor in tensors.items()}, folder / parts[0])
    assert base_digest(config(folder)) != here


def test_a_folder_without_weights_has_no_digest(folder: Path) -> None:
    changed(folder, quantization_config={"quant_method": "fp8"})
    (folder / "model.safetensors").write_bytes(START + b"\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(UserError, match="is a Git LFS pointer"):
        base_digest(config(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights"):
        base_digest(config(folder))
