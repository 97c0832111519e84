"""A base model's digest: the same wherever the same weights are, another where anything differs."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hfedmoe.config import RunConfig, load_config
from hfedmoe.models import digest
from hfedmoe.models.digest import base_digest
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


def test_it_is_computed_once_until_a_file_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = base_digest(config(folder))
    monkeypatch.setattr(digest, "_of_shards", lambda shards: pytest.fail("computed again"))
    assert base_digest(config(folder)) == first
    tensors = {name: tensor + torch.ones(1) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        base_digest(config(folder))
