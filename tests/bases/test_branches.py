"""A dense model's blocks become experts that belong to domains."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hfedmoe.bases.branches import CHANGES, DOMAINS, Recipe, build_branches
from hfedmoe.bases.routers import ridge_router
from hfedmoe.bases.texts import Piece
from hfedmoe.errors import UserError
from hfedmoe.models.tiny import tiny_tokenizer
from tests.moe.test_branching import tiny_llama

SMALL = Recipe(layers=2, rank=2, tokens=12, texts=12, fitted=6, batch=4, scored=16, steps=3, lr=1e-2)
LAST = SMALL.steps * len(DOMAINS)


def texts() -> list[Piece]:
    """Each domain's texts are of words of its own."""
    every = [domain for domains in DOMAINS.values() for domain in domains]
    return [
        Piece(" ".join([domain, f"w{number}", domain] * 3), domain, domain) for domain in every for number in range(12)
    ]


def quiet(done: int, going: str, left: float | None) -> None:
    pass


def stop_at(wanted: int) -> Callable[[int, str, float | None], None]:
    def report(done: int, going: str, left: float | None) -> None:
        if done == wanted:
            raise KeyboardInterrupt

    return report


def dense() -> LlamaForCausalLM:
    return tiny_llama(vocab_size=len(tiny_tokenizer()))


def build(out: Path, recipe: Recipe = SMALL, report: Callable[[int, str, float | None], None] = quiet) -> None:
    build_branches(out, recipe, dense(), tiny_tokenizer(), texts(), report)


def test_a_stopped_build_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    build(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "stopped", report=stop_at(SMALL.steps * 2 + 1))
    assert not (tmp_path / "stopped").exists()
    state = tmp_path / ".stopped.branching"
    assert sorted(file.name for file in state.glob("*.deltas.*")) == ["0.deltas.safetensors", "1.deltas.safetensors"]
    with pytest.raises(UserError, match="another recipe"):
        build(tmp_path / "stopped", replace(SMALL, seed=1))
    steps: list[int] = []
    build(tmp_path / "stopped", report=lambda done, going, left: steps.append(done) if left is not None else None)
    assert steps == list(range(SMALL.steps * 2 + 1, LAST + 1))
    assert not state.exists()
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    build(tmp_path / "other", replace(SMALL, seed=1))
    other = load_file(tmp_path / "other" / CHANGES)
    same = load_file(tmp_path / "whole" / CHANGES)
    assert not torch.equal(other["layers.2.up.b"], same["layers.2.up.b"])


def test_plain_transformers_loads_the_dense_model_and_its_changes(tmp_path: Path) -> None:
    build(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.model_type == "qwen2_moe"
    assert model.config.mlp_only_layers == [0, 1]
    before, deltas = dense(), load_file(tmp_path / "out" / CHANGES)
    for layer in (2, 3):
        experts, block = model.model.layers[layer].mlp.experts, before.model.layers[layer].mlp
        assert torch.equal(experts.down_proj[0], block.down_proj.weight)  # expert 0 is the model as it was
        change = deltas[f"layers.{layer}.down.b"][4].float() @ deltas[f"layers.{layer}.down.a"][4].float()
        assert change.abs().max() > 1e-4
        assert torch.allclose(experts.down_proj[5], block.down_proj.weight + change, atol=1e-6)
        change = deltas[f"layers.{layer}.up.b"][0].float() @ deltas[f"layers.{layer}.up.a"][0].float()
        assert torch.allclose(experts.gate_up_proj[1, 32:], block.up_proj.weight + change, atol=1e-6)
        assert torch.equal(
            model.model.layers[layer].self_attn.q_proj.weight, before.model.layers[layer].self_attn.q_proj.weight
        )
        router = model.model.layers[layer].mlp.gate.weight
        assert torch.equal(deltas[f"layers.{layer}.router"], router.bfloat16())
        assert router.abs().amax(1).min() > 0


def test_too_few_texts_of_a_branch_are_named(tmp_path: Path) -> None:
    few = [piece for piece in texts() if piece.domain not in ("energy", "commodities")]
    with pytest.raises(UserError, match="resources: 0 texts of the domains energy, commodities are too few"):
        build_branches(tmp_path / "out", SMALL, dense(), tiny_tokenizer(), few, quiet)
    assert not (tmp_path / "out").exists()


def test_routers_tell_branches_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    owners = torch.arange(600) % 3 + 1
    centres = torch.tensor([[1.0, 0, 0, 2], [0, 1.0, 0, 2], [0, 0, 1.0, 2]])  # the last part is the same for all
    x = centres[owners - 1] + 0.1 * torch.randn(600, 4, generator=generator)
    logits = x @ ridge_router(x, owners, 4, top_k=2, temperature=0.1, general=0.25).T
    assert (logits[:, 1:].argmax(1) + 1 == owners).float().mean() > 0.99
    assert logits[:, 1:].mean(0).abs().max() < 1e-3
    chosen = (logits.topk(2).indices == 0).any(1).float().mean()
    assert 0.15 < chosen < 0.35
