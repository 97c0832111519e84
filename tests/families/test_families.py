"""Every supported family against the stock model: outputs, gradients, residency and routing statistics."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.routing import Batch
from tests.families.table import FAMILIES, build, inputs

pytestmark = pytest.mark.parametrize("family", FAMILIES)
RANK, ALPHA = 4, 8.0


def randomise_adapters(model: MoEModel, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for state in model.states:
        for stack in state.trained.stacks.values():
            stack.copy_(torch.randn(stack.shape, generator=generator) * 0.3)


def merged_parameters(model: MoEModel, stock: Any) -> dict[str, Tensor]:
    """The stock model's expert parameters as differentiable functions of our LoRA leaves: W + scale * B A."""
    merged = {}
    for state in model.states:
        trained = state.trained
        for side, base in (("up", "up"), ("down", "down")):
            delta = [
                trained.scale * trained.leaves[f"{side}_b"][e] @ trained.leaves[f"{side}_a"][e]
                for e in range(trained.num_experts)
            ]
            if state.math().transposed:
                delta = [d.t() for d in delta]
            weight = [tensor + d for tensor, d in zip(state.tensors()[base], delta, strict=True)]
            prefix = f"{state.layer.name}.experts"
            if state.stacked:
                merged[f"{prefix}.{'gate_up_proj' if side == 'up' else 'down_proj'}"] = torch.stack(weight)
            else:
                for e, matrix in enumerate(weight):
                    merged[f"{prefix}.expert_{e}.{'wi' if side == 'up' else 'wo'}.weight"] = matrix
    return merged


def loss_of(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    mix = torch.linspace(-1, 1, logits.shape[-1])
    picked = (logits.float().log_softmax(-1) * mix).sum(-1)
    return picked.sum() if mask is None else (picked * mask).sum()


def gradients(loss: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def some_resident(model: MoEModel) -> list[Tensor]:
    """Half of the experts (top-k at least), different ones in each layer."""
    masks = []
    for layer in model.layers:
        keep = torch.zeros(layer.num_experts, dtype=torch.bool)
        keep[torch.arange(layer.index % 2, layer.num_experts, 2)] = True
        keep[: layer.top_k] = True
        masks.append(keep)
    return masks


def test_outputs_equal_the_stock_model(family: str) -> None:
    stock = build(family)
    x = inputs(stock)
    expected = stock(**x).logits
    ours = MoEModel(build(family), rank=RANK)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours.model(**x).logits, expected, atol=1e-5, rtol=0)


def test_lora_gradients_equal_autograd_through_merged_weights(family: str) -> None:
    ours, stock = MoEModel(build(family), rank=RANK, alpha=ALPHA), build(family)
    randomise_adapters(ours)
    x = inputs(stock)
    leaves = [leaf for state in ours.states for name in state.trained.names for leaf in state.trained.leaves[name]]
    routers = list(ours.routers.values())
    embedding = ours.model.get_input_embeddings().weight.requires_grad_(True)
    loss = loss_of(ours.model(**x).logits)
    got = gradients(loss, [*leaves, *routers, embedding])

    merged = merged_parameters(ours, stock)
    stock_loss = loss_of(functional_call(stock, merged, kwargs=x).logits)
    names = dict(stock.named_parameters())
    stock_routers = [
        names[f"{state.layer.name}.{_router_name(state)}.{parameter}"]
        for state in ours.states
        for parameter, _ in state.layer.router.named_parameters()
    ]
    expected = gradients(stock_loss, [*leaves, *stock_routers, stock.get_input_embeddings().weight])
    torch.testing.assert_close(loss, stock_loss, atol=1e-4, rtol=1e-5)
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-4, rtol=1e-4)
    assert all(g.abs().max() > 1e-6 for g in got[len(leaves) : -1]), "a router got no gradient"


def _router_name(state: Any) -> str:
    return next(name for name, child in state.layer.block.named_children() if child is state.layer.router)


def test_full_training_gradients_equal_the_stock_model(family: str) -> None:
    ours, stock = MoEModel(build(family), experts="full"), build(family)
    x = inputs(stock)
    loss_of(ours.model(**x).logits).backward()
    loss_of(stock(**x).logits).backward()
    for state in ours.states:
        experts = stock.get_submodule(f"{state.layer.name}.experts")
        for expert in range(state.layer.num_experts):
            if state.stacked:
                reference = {"up": experts.gate_up_proj.grad[expert], "down": experts.down_proj.grad[expert]}
                if experts.has_bias:
                    reference["up_bias"] = experts.gate_up_proj_bias.grad[expert]
                    reference["down_bias"] = experts.down_proj_bias.grad[expert]
            else:
                member = experts[f"expert_{expert}"]
                reference = {"up": member.wi.weight.grad, "down": member.wo.weight.grad}
            for name, grad in reference.items():
                mine = state.trained.leaves[name][expert].grad
                if mine is None:  # no tokens: no gradient at all, where the stock model makes zeros
                    assert grad is None or not grad.any()
                else:
                    torch.testing.assert_close(mine, grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("experts", ["lora", "full"])
def test_mask_and_carved_model_agree(family: str, experts: str) -> None:
    masked, carved = (MoEModel(build(family), experts=experts, rank=RANK) for _ in range(2))
    randomise_adapters(masked)
    randomise_adapters(carved)
    resident = some_resident(masked)
    before = sum(p.numel() for p in carved.model.parameters())
    masked.set_resident(resident)
    carved.carve(resident)
    assert sum(p.numel() for p in carved.model.parameters()) < before
    x = inputs(masked.model)
    outputs = [m.model(**x).logits for m in (masked, carved)]
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-6, rtol=0)
    for output in outputs:
        loss_of(output).backward()
    for one, other, keep in zip(masked.states, carved.states, resident, strict=True):
        for name in one.trained.names:
            kept = [leaf for leaf, k in zip(one.trained.leaves[name], keep.tolist(), strict=True) if k]
            dropped = [leaf for leaf, k in zip(one.trained.leaves[name], keep.tolist(), strict=True) if not k]
            assert all(leaf.grad is None for leaf in dropped), "an absent expert was trained"
            for mine, theirs in zip(kept, other.trained.leaves[name], strict=True):
                assert (mine.grad is None) == (theirs.grad is None)
                if mine.grad is not None:
                    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-5)
    for name, router in masked.routers.items():
        torch.testing.assert_close(router.grad, carved.routers[name].grad, atol=1e-6, rtol=1e-5)


def test_one_resident_per_group_never_runs_an_absent_expert(family: str) -> None:
    """Group-limited routers may be left without enough residents in the groups they pick."""
    model = MoEModel(build(family), rank=RANK)
    resident = []
    for layer in model.layers:
        keep = torch.zeros(layer.num_experts, dtype=torch.bool)
        keep[:: max(1, layer.num_experts // max(layer.top_k, 4))] = True
        resident.append(keep)
    model.set_resident(resident)
    loss_of(model.model(**inputs(model.model, batch=8)).logits).backward()
    for flags, keep in zip(model.trained_now(), resident, strict=True):
        assert not (torch.tensor(flags) & ~keep).any()


def test_routing_goes_to_residents_only_and_statistics_do_not_see_the_mask(family: str) -> None:
    model = MoEModel(build(family), rank=RANK)
    x = inputs(model.model)
    mask = x["attention_mask"]
    decoder_mask = torch.ones_like(x["decoder_input_ids"]) if "decoder_input_ids" in x else mask
    batch = Batch(decoder_mask, mask if "decoder_input_ids" in x else None)
    first = model.routing[0]  # only the first layer's input is the same with and without the mask

    model.watch(batch)
    model.model(**x)
    whole = first.evidence
    assert whole is not None
    model.set_resident(some_resident(model))
    model.watch(batch)
    model.model(**x)
    assert first.evidence is not None
    torch.testing.assert_close(first.evidence.g, whole.g)
    torch.testing.assert_close(whole.g.sum(1), torch.ones(whole.g.shape[0]))
    for routing, resident in zip(model.routing, some_resident(model), strict=True):
        assert not (routing.tokens > 0)[~resident].any()
        tokens = batch.of(routing.layer).sum() * routing.layer.top_k
        assert 0 < routing.tokens.sum() <= tokens, "padding was counted, or nothing was routed"


def test_padding_does_not_change_statistics(family: str) -> None:
    model = MoEModel(build(family), rank=RANK)
    x = inputs(model.model)
    encoder = {**x, "input_ids": torch.where(x["attention_mask"] > 0, x["input_ids"], 7)}
    batch = Batch(
        torch.ones_like(x["decoder_input_ids"]) if "decoder_input_ids" in x else x["attention_mask"],
        x["attention_mask"] if "decoder_input_ids" in x else None,
    )
    seen = []
    for variant in (x, encoder):
        model.watch(batch)
        model.model(**variant)
        seen.append([(r.evidence.g, r.evidence.routed) for r in model.routing])
    for (g, routed), (other_g, other_routed) in zip(*seen, strict=True):
        torch.testing.assert_close(g, other_g, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(routed, other_routed)


def test_routers_receive_gradient(family: str) -> None:
    model = MoEModel(build(family), rank=RANK)
    assert model.router_gradient_problem() is None
    loss_of(model.model(**inputs(model.model)).logits).backward()
    assert all(router.grad is not None and router.grad.any() for router in model.routers.values())
    assert all(p.grad is None for p in model.model.parameters() if not p.requires_grad)
