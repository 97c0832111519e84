"""One truth about a checkpoint: whole or carved, a model has the weights that transformers loads."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hfedmoe.config import ModelConfig, RunConfig
from hfedmoe.errors import UserError
from hfedmoe.files.lfs import START
from hfedmoe.models.digest import weights_digest
from hfedmoe.models.loading import load, structure
from hfedmoe.models.tiny import tiny_model, tiny_tokenizer
from hfedmoe.moe.model import MoEModel
from hfedmoe.report.plan import plan_for
from tests.families.table import build


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in one file."""
    return saved(tmp_path / "model", 0)


def saved(folder: Path, seed: int, **options: Any) -> Path:
    tokenizer = tiny_tokenizer()
    tiny_model(len(tokenizer), seed).save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    return folder


def weights(folder: Path, carve: bool) -> dict[str, torch.Tensor]:
    """Head and first expert of a model that was loaded by us."""
    loaded = load(ModelConfig(name=str(folder), device="cpu"), seed=0, carve=carve)
    model = MoEModel(loaded.model, store=loaded.store)
    model.set_resident(None)
    x = torch.arange(12)[None]
    return {"logits": model.model(input_ids=x, attention_mask=torch.ones_like(x)).logits.detach()}


def stock(folder: Path) -> torch.Tensor:
    model, x = AutoModelForCausalLM.from_pretrained(folder).eval(), torch.arange(12)[None]
    logits: torch.Tensor = model(input_ids=x, attention_mask=torch.ones_like(x)).logits.detach()
    return logits


def same_as_stock(folder: Path) -> bool:
    reference = stock(folder)
    return all(torch.allclose(weights(folder, carve)["logits"], reference, atol=1e-5) for carve in (False, True))


def test_a_folder_that_was_saved_in_shards_and_then_whole_is_read_whole(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", 1, max_shard_size="200KB")
    before = stock(folder)
    shutil.copy(saved(tmp_path / "other", 2) / "model.safetensors", folder)
    assert (folder / "model.safetensors.index.json").is_file()
    assert not torch.allclose(stock(folder), before)
    assert same_as_stock(folder)


def test_a_file_that_the_config_names_is_the_one_to_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", 1)
    shutil.copy(saved(tmp_path / "other", 2) / "model.safetensors", folder / "best.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "best.safetensors"}))
    assert torch.allclose(stock(folder), stock(tmp_path / "other"))
    assert same_as_stock(folder)


def test_shards_may_lie_in_folders_of_their_own(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", 1, max_shard_size="200KB")
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    (folder / "parts").mkdir()
    for name in sorted(set(places["weight_map"].values())):
        (folder / name).rename(folder / "parts" / name)
    places["weight_map"] = {tensor: f"parts/{name}" for tensor, name in places["weight_map"].items()}
    index.write_text(json.dumps(places))
    assert same_as_stock(folder)


@pytest.mark.parametrize("carve", [False, True])
@pytest.mark.parametrize("with_model", [False, True])
def test_an_adapter_is_never_added_nor_passed_over(folder: Path, tmp_path: Path, carve: bool, with_model: bool) -> None:
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    place = folder if with_model else tmp_path / "adapter"
    before = stock(folder)
    adapted.save_pretrained(place)
    if with_model:
        assert not torch.allclose(stock(folder), before)  # transformers adds it
    with pytest.raises(UserError, match=r"PEFT adapter .*adapter_config.json") as caught:
        load(ModelConfig(name=str(place), device="cpu"), seed=0, carve=carve)
    assert "\n" not in str(caught.value)


def without(folder: Path, part: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if part not in name}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("carve", [False, True])
@pytest.mark.parametrize(
    ("part", "named"),
    [
        ("lm_head.weight", "lm_head.weight"),
        ("model.layers.1.block_sparse_moe.gate", r"model.layers.1.mlp.gate.weight"),
        ("layers.2.input_layernorm", "model.layers.2.input_layernorm.weight"),
        ("block_sparse_moe.experts", r"experts.down_proj, .* and \d+ more"),
        ("layers.3.block_sparse_moe.experts.5.w2", "layers.3.mlp.experts.down_proj"),
    ],
)
def test_what_is_missing_is_named_and_never_random(folder: Path, part: str, named: str, carve: bool) -> None:
    without(folder, part)
    with pytest.raises(UserError, match=named) as caught:
        load(ModelConfig(name=str(folder), device="cpu"), seed=0, carve=carve)
    assert "\n" not in str(caught.value)


def test_a_head_that_differs_from_the_embedding_is_used_whatever_the_config_says(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert same_as_stock(folder)  # the head that is stored, not the embedding
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert same_as_stock(folder)


@pytest.mark.parametrize("stored", ["lm_head.weight", "model.embed_tokens.weight"])
def test_one_of_two_tied_tensors_is_enough(folder: Path, stored: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    without(folder, "lm_head" if "embed" in stored else "embed_tokens")
    assert same_as_stock(folder)


@pytest.mark.parametrize("carve", [False, True])
@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_said_to_be_one(folder: Path, file: str, carve: bool) -> None:
    (folder / file).write_bytes(START + b"\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(UserError, match=rf"{file}: is a Git LFS pointer.*git lfs pull") as caught:
        load(ModelConfig(name=str(folder), device="cpu"), seed=0, carve=carve)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["chat_template.jinja", "special_tokens_map.json", "spiece.model", "vocab.txt"])
def test_a_pointer_in_place_of_a_tokenizer_or_template_is_said_first(folder: Path, file: str) -> None:
    (folder / file).write_bytes(START + b"\noid sha256:4d7a\nsize 12345\n")
    (folder / "model.safetensors").write_bytes(b"damaged")
    for read in (lambda c: load(c, seed=0), lambda c: load(c, seed=0, carve=True), structure):
        with pytest.raises(UserError, match=rf"{file}: is a Git LFS pointer.*git lfs pull"):
            read(ModelConfig(name=str(folder), device="cpu"))


def test_a_pointer_in_place_of_weights_that_are_not_loaded_does_not_matter(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(START + b"\noid sha256:4d7a\nsize 12345\n")
    assert same_as_stock(folder)


def changed(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    tensors = {name: change(name, tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("how", ["safetensors", "pickled", "quiet"])
@pytest.mark.parametrize(
    ("part", "cut", "named"),
    [
        ("lm_head.weight", None, "lm_head.weight"),
        ("embed_tokens", 8, r"model.embed_tokens.weight.*\[\d+, 64\]"),
        (
            "experts.3.w1",
            8,
            r"model.layers.0.mlp.experts.gate_up_proj cannot be used \(stack expects each tensor",
        ),
    ],
)
def test_a_tensor_that_cannot_be_used_is_named_in_one_line(
    folder: Path, part: str, cut: int | None, named: str, how: str, caplog: Any, monkeypatch: Any
) -> None:
    """Nothing else is printed: transformers' own report has tens of lines."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    if how == "quiet":
        monkeypatch.setattr(logging.getLogger("transformers"), "level", logging.ERROR)
    changed(folder, lambda name, t: t if part not in name else None if cut is None else t[:-cut].clone())
    if how != "safetensors":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=named) as caught:
        load(ModelConfig(name=str(folder), device="cpu"), seed=0)
    assert "\n" not in str(caught.value)
    assert "above report" not in str(caught.value)
    assert not caplog.text


def test_unused_tensors_are_still_reported(folder: Path, caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"spare.weight": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    load(ModelConfig(name=str(folder), device="cpu"), seed=0)
    assert "spare.weight" in caplog.text


def test_fp8_without_its_config_is_refused_by_all(folder: Path) -> None:
    changed(folder, lambda name, tensor: tensor.to(torch.float8_e4m3fn) if "experts" in name else tensor)
    config = RunConfig(model=ModelConfig(name=str(folder), device="cpu"))
    lines = []
    for read in (lambda: load(config.model, 0), lambda: weights_digest(config), lambda: plan_for(config)):
        with pytest.raises(UserError, match="is stored as F8_E4M3, which cannot be read without") as caught:
            read()
        lines.append(str(caught.value))
    assert len(set(lines)) == 1
    (folder / "model.safetensors").unlink()  # planned for before it is downloaded
    assert plan_for(config).quantised is None


@pytest.mark.parametrize("carve", [False, True])
def test_a_correction_bias_that_is_not_stored_is_never_zero(tmp_path: Path, carve: bool) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    build("deepseek_v3").save_pretrained(tmp_path)
    load(ModelConfig(name=str(tmp_path), device="cpu"), seed=0, carve=carve)
    changed(tmp_path, lambda name, tensor: None if "correction_bias" in name else tensor)
    with pytest.raises(UserError, match=r"the checkpoint has no model.layers.*gate.e_score_correction_bias"):
        load(ModelConfig(name=str(tmp_path), device="cpu"), seed=0, carve=carve)


def test_a_buffer_that_a_family_leaves_out_on_purpose_may_be_missing(tmp_path: Path, monkeypatch: Any) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    model = build("deepseek_v3")
    model.save_pretrained(tmp_path)
    changed(tmp_path, lambda name, tensor: None if "correction_bias" in name else tensor)
    monkeypatch.setattr(type(model), "_keys_to_ignore_on_load_missing", ["e_score_correction_bias"])
    assert same_as_stock(tmp_path)
