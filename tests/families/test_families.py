"""Every supported family against the stock model: outputs, gradients, residency and routing statistics."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hfedmoe.export.merged import merge, save
from hfedmoe.moe.anatomy import find_moe_layers
from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.routing.tokens import TokenMasks
from hfedmoe.moe.weights.shards import Shards
from hfedmoe.moe.weights.skeleton import empty_model, fill
from tests.families.table import FAMILIES, build, inputs

pytestmark = pytest.mark.parametrize("family", FAMILIES)
RANK, ALPHA = 4, 8.0
SIGMOID = [
    "afmoe",
    "axk1",
    "axk2",
    "bailing_hybrid",
    "beam",
    "cohere2_moe",
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "dots3_note_text",
    "exaone_moe",
    "flint",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "hy_v3",
    "hy_v4",
    "inkling2_text",
    "inkling_text",
    "kimi_linear",
    "kolibri1",
    "laguna",
    "lfm2_moe",
    "llama4_text",
    "mimo_v2_flash",
    "minimax_m2",
    "minimax_m3_vl_text",
    "nemotron_h",
    "solar_open",
]
"""Families whose routers score by sigmoid; DeepSeek-V4 takes the root of softplus, all others softmax."""


def logits_of(model: Any, x: dict[str, Tensor]) -> Tensor:
    """Outputs with a fixed seed: some routers sample in training."""
    torch.manual_seed(3)
    return model(**x).logits


def randomise_adapters(model: MoEModel, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for state in model.states:
        for stack in state.trained.stacks.values():
            stack.copy_(torch.randn(stack.shape, generator=generator) * 0.3)


def merged_parameters(model: MoEModel) -> dict[str, Tensor]:
    """The stock model's expert parameters as differentiable functions of our LoRA leaves: W + scale * B A."""
    merged = {}
    for state in model.states:
        trained, names = state.trained, state.layout.names()
        for side in ("up", "down"):
            delta = [
                trained.scale * trained.leaves[f"{side}_b"][e] @ trained.leaves[f"{side}_a"][e]
                for e in range(trained.num_experts)
            ]
            if state.math().transposed:
                delta = [d.t() for d in delta]
            weights = [tensor + d for tensor, d in zip(state.tensors()[side], delta, strict=True)]
            if state.layout.stacked:
                merged[names[0][side]] = torch.stack(weights)
            else:
                merged |= {own[side]: weight for own, weight in zip(names, weights, strict=True)}
    return merged


def as_in(stock: Any, merged: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, with the rows that some families keep for experts which compute nothing."""
    own = dict(stock.named_parameters())
    return {name: torch.cat([tensor, own[name][len(tensor) :].detach()]) for name, tensor in merged.items()}


def stock_routers(ours: MoEModel, stock: Any) -> list[Tensor]:
    """The stock model's tensors that are our `routers`, in the same order."""
    place = {id(parameter): name for name, parameter in ours.model.named_parameters()}
    own = dict(stock.named_parameters())
    return [own[place[id(router)]] for router in ours.routers.values()]


def assert_alike(found: Tensor, expected: Tensor, rounding: float = 1e-4) -> None:
    """Equal up to rounding, as sums of the largest entries have it."""
    torch.testing.assert_close(found, expected, atol=rounding * max(1.0, float(expected.abs().max())), rtol=rounding)


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
    expected = logits_of(stock, x)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits_of(MoEModel(build(family), rank=RANK).model, x), expected, atol=1e-5, rtol=0)


def test_lora_gradients_equal_autograd_through_merged_weights(family: str) -> None:
    ours, stock = MoEModel(build(family), rank=RANK, alpha=ALPHA), build(family)
    randomise_adapters(ours)
    x = inputs(stock)
    leaves = [leaf for state in ours.states for name in state.trained.names for leaf in state.trained.leaves[name]]
    routers = list(ours.routers.values())
    embedding = ours.model.get_input_embeddings().weight.requires_grad_(True)
    loss = loss_of(logits_of(ours.model, x))
    got = gradients(loss, [*leaves, *routers, embedding])

    torch.manual_seed(3)
    stock_loss = loss_of(functional_call(stock, as_in(stock, merged_parameters(ours)), kwargs=x).logits)
    theirs = [*leaves, *stock_routers(ours, stock), stock.get_input_embeddings().weight]
    torch.testing.assert_close(loss, stock_loss, atol=1e-4, rtol=1e-5)
    for mine, reference in zip(got, gradients(stock_loss, theirs), strict=True):
        assert_alike(mine, reference)
    assert all(g.abs().max() > 1e-6 for g in got[len(leaves) :]), "a router or the embedding got no gradient"


def test_full_training_gradients_equal_the_stock_model(family: str) -> None:
    ours, stock = MoEModel(build(family), experts="full"), build(family)
    x = inputs(stock)
    loss_of(logits_of(ours.model, x)).backward()
    loss_of(logits_of(stock, x)).backward()
    theirs = dict(stock.named_parameters())
    for state in ours.states:
        names = state.layout.names()
        for expert in range(state.layer.num_experts):
            for kind, name in names[0 if state.layout.stacked else expert].items():
                grad = theirs[name].grad
                grad = grad[expert] if state.layout.stacked and grad is not None else grad
                mine = state.trained.leaves[kind][expert].grad
                if mine is None:  # no tokens: no gradient at all, where the stock model makes zeros
                    assert grad is None or not grad.any()
                else:
                    assert_alike(mine, grad)


def test_steps_with_recomputed_activations_and_in_bfloat16_stay_close(family: str) -> None:
    found = {}
    for way in ("plain", "checkpointed", "autocast"):
        model = MoEModel(build(family), rank=RANK)
        randomise_adapters(model)
        # With as many experts as a token uses none can be exchanged for another by rounding.
        model.set_resident([torch.arange(layer.num_experts) < layer.top_k for layer in model.layers])
        if way == "checkpointed":
            model.checkpoint_activations()
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            loss = loss_of(logits_of(model.model, inputs(model.model)))
        loss.backward()
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
        found[way] = torch.cat([grad.flatten() for grad in grads])
    assert_alike(found["checkpointed"], found["plain"], 1e-5)
    assert torch.cosine_similarity(found["autocast"], found["plain"], dim=0) > 0.99
    assert 0.85 < found["autocast"].norm() / found["plain"].norm() < 1.15


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
    batch = batch_of(x)
    first = model.routing[0]  # only the first layer's input is the same with and without the mask

    model.watch(batch)
    logits_of(model.model, x)
    whole = first.evidence
    assert whole is not None
    model.set_resident(some_resident(model))
    model.watch(batch)
    chosen = indices_of(model)
    logits_of(model.model, x)
    assert first.evidence is not None
    torch.testing.assert_close(first.evidence.g, whole.g)
    torch.testing.assert_close(first.evidence.routed, whole.routed)
    torch.testing.assert_close(whole.g.sum(1), torch.ones(whole.g.shape[0]))
    for routing, resident, index in zip(model.routing, some_resident(model), chosen, strict=True):
        if not routing.layer.fixed_routing:  # where experts are looked up by token, those of absent ones add nothing
            index = torch.cat(index).flatten()
            assert resident[index[index < routing.layer.num_experts]].all()
        tokens = batch.of(routing.layer).keep.sum() * routing.layer.top_k
        assert 0 < routing.tokens.sum() <= tokens, "padding was counted, or nothing was routed"


def indices_of(model: MoEModel) -> list[list[Tensor]]:
    """What routers choose from now on, [T, K] per layer and pass: seen before anything is made of it."""
    seen: list[list[Tensor]] = []
    for state in model.states:
        own: list[Tensor] = []

        def note(index: Tensor, weights: Tensor, own: Any = own, observe: Any = state.observer) -> None:
            own.append(index)
            observe(index, weights)

        state.observer = note
        seen.append(own)
    return seen


def batch_of(x: dict[str, Tensor]) -> TokenMasks:
    if "decoder_input_ids" in x:
        return TokenMasks(torch.ones_like(x["decoder_input_ids"]), x["attention_mask"])
    return TokenMasks(x["attention_mask"])


@torch.no_grad()
def test_statistics_are_those_of_the_stock_router(family: str) -> None:
    """Shares of each expert per sample, worked out from what goes into the first router of the stock model."""
    model, stock = MoEModel(build(family).eval(), rank=RANK), build(family).eval()
    x, batch = inputs(stock), batch_of(inputs(stock))
    model.watch(batch)
    model.model(**x)
    routing, layer = model.routing[0], model.layers[0]
    number = layer.num_experts
    router = find_moe_layers(stock)[0].router
    name, weight = next((n, p) for n, p in router.named_parameters() if p.dim() == 2 and p.shape[0] >= number)
    hidden: list[Tensor] = []
    for module in (router, router.get_submodule(name.rpartition(".")[0])):  # some norm it before the linear map
        module.register_forward_pre_hook(lambda _, args: hidden.append(args[0].reshape(-1, args[0].shape[-1])))
    stock(**x)
    logits = hidden[-1].float() @ weight.t()
    bias = getattr(router, "bias", None)
    logits = (logits if bias is None else logits + bias)[:, :number]
    if family == "deepseek_v4":
        shares = torch.nn.functional.softplus(logits).sqrt()
    else:
        shares = logits.sigmoid() if family in SIGMOID else logits.softmax(-1)
    shares = (shares / shares.sum(-1, keepdim=True)).view(len(x["input_ids"]), -1, number)
    counted = batch.of(layer).keep
    expected = torch.stack([rows[keep].mean(0) for rows, keep in zip(shares, counted, strict=True)])
    assert routing.evidence is not None
    torch.testing.assert_close(routing.evidence.g, expected, atol=1e-5, rtol=1e-4)


def test_padding_does_not_change_statistics(family: str) -> None:
    model = MoEModel(build(family), rank=RANK)
    x = inputs(model.model)
    encoder = {**x, "input_ids": torch.where(x["attention_mask"] > 0, x["input_ids"], 7)}
    batch = batch_of(x)
    seen = []
    for variant in (x, encoder):
        model.watch(batch)
        logits_of(model.model, variant)
        seen.append([(r.evidence.g, r.evidence.routed) for r in model.routing])
    for (g, routed), (other_g, other_routed) in zip(*seen, strict=True):
        torch.testing.assert_close(g, other_g, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(routed, other_routed)


def test_no_expert_works_on_padding_or_learns_from_it(family: str) -> None:
    model = MoEModel(build(family).eval(), rank=RANK)
    randomise_adapters(model)
    x = inputs(model.model)
    batch = batch_of(x)
    expected = logits_of(model.model, x)[batch.mask.bool()]
    model.watch(batch)
    logits = logits_of(model.model, x)
    torch.testing.assert_close(logits[batch.mask.bool()], expected, atol=1e-4, rtol=1e-4)
    loss_of(logits, batch.mask).backward()
    for routing, flags in zip(model.routing, model.trained_now(), strict=True):
        assert flags == (routing.tokens > 0).tolist()


def test_routers_receive_gradient(family: str) -> None:
    model = MoEModel(build(family), rank=RANK)
    assert model.router_gradient_problem() is None
    loss_of(model.model(**inputs(model.model)).logits).backward()
    assert all(router.grad is not None and router.grad.any() for router in model.routers.values())
    assert all(p.grad is None for p in model.model.parameters() if not p.requires_grad)


def test_merged_weights_saved_by_expert_load_in_stock_transformers_and_carved(family: str, tmp_path: Path) -> None:
    ours = MoEModel(build(family).eval(), rank=RANK, alpha=ALPHA)
    randomise_adapters(ours)
    x = inputs(ours.model)
    expected = logits_of(ours.model, x)
    merge(ours, torch.float32)
    save(ours.model, tmp_path)
    stock = type(ours.model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    # Merging rounds the weights, and the logits by so much of their scale: 1.3e-5 of 3.8 in qwen3_next with AVX-512.
    near = 1e-5 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(logits_of(stock, x), expected, atol=near, rtol=0)

    auto = AutoModelForSeq2SeqLM if stock.config.is_encoder_decoder else AutoModelForCausalLM
    empty = empty_model(auto, AutoConfig.from_pretrained(tmp_path), torch.float32, attn_implementation="eager")
    carved = MoEModel(empty, store=fill(empty, Shards(tmp_path), torch.float32, "same", torch.device("cpu")))
    carved.set_resident(None)
    torch.testing.assert_close(logits_of(carved.model, x), expected, atol=near, rtol=0)
