"""Merged experts stand in for absent ones: as a whole model whose absent experts are the weighted means."""

from typing import Any

import pytest
import torch

from hfedmoe.moe import payload
from hfedmoe.moe.experts.merged import Mixture
from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.routing.tokens import TokenMasks
from tests.families.table import CORE, inputs
from tests.moe.test_carving import gradients, opened, saved

LORA = ("up_a", "up_b", "down_a", "down_b")


def mixtures_of(model: MoEModel, resident: list[torch.Tensor]) -> list[list[Mixture]]:
    """Two per layer: the first absent expert alone, and all others."""
    found = []
    for keep in resident:
        first, *rest = (~keep).nonzero()[:, 0].tolist()
        shares = torch.rand(len(rest), generator=torch.Generator().manual_seed(len(found)))
        found.append([Mixture([first], [1.0]), Mixture(rest, (shares / shares.sum()).tolist())])
    return found


def reference(folder: Any, family: str, sent: dict[str, torch.Tensor], mixtures: list[list[Mixture]], how: str) -> Any:
    """The whole model in which every absent expert is its mixture, in its base weights."""
    whole = MoEModel(saved(family, folder), experts=how)
    payload.load_all(whole, sent)
    for state, own in zip(whole.states, mixtures, strict=True):
        assert state.trained is not None
        base, layer = {name: tensor.clone() for name, tensor in state.tensors().items()}, state.layer.index
        now = {name: tensor.clone() for name, tensor in base.items()}
        if how == "lora":
            for side in ("up", "down"):
                delta = sent[f"experts.{layer}.{side}_b"] @ sent[f"experts.{layer}.{side}_a"] * state.trained.scale
                now[side] += delta.mT if state.math().transposed else delta
        for mixture in own:
            for name in now:
                mean = sum(s * now[name][e] for e, s in zip(mixture.experts, mixture.shares, strict=True))
                base[name][mixture.experts] = mean
            for name, stack in state.trained.stacks.items() if how == "lora" else ():
                if name.endswith("_b"):
                    stack[mixture.experts] = 0.0
        if how == "lora":
            state.set_tensors(base)
        else:
            for name, stack in state.trained.stacks.items():
                stack.copy_(base[name])
    return whole


@pytest.mark.parametrize("how", ["lora", "full"])
@pytest.mark.parametrize("carved", [False, True])
@pytest.mark.parametrize("family", CORE)
def test_the_router_is_free_and_absent_experts_are_their_means(
    family: str, carved: bool, how: str, tmp_path: Any
) -> None:
    model = MoEModel(saved(family, tmp_path), experts=how)
    model = opened(tmp_path, experts=how) if carved else model
    resident = [torch.arange(number) >= number - 1 - number // 4 for number in model.num_experts]
    draws = torch.Generator().manual_seed(0)
    sent = payload.global_tensors(MoEModel(saved(family, tmp_path), experts=how))
    for name, tensor in sent.items():
        if name.startswith("experts"):
            tensor.add_(torch.randn(tensor.shape, generator=draws) * 0.1)
    mixtures = mixtures_of(model, resident)
    model.set_resident(resident, [1] * len(resident))
    payload.load(model, payload.pack(sent, resident), resident)
    model.stand_in(mixtures, sent)
    whole = reference(tmp_path, family, sent, mixtures, how)
    batch = inputs(model.model)
    (loss, _), (expected, _) = gradients(model, batch), gradients(whole, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    for name, router in model.routers.items():
        assert router.grad is not None, name
        torch.testing.assert_close(router.grad, whole.routers[name].grad, rtol=1e-3, atol=1e-6)
    for state, other, keep in zip(model.states, whole.states, resident, strict=True):
        assert state.trained is not None
        assert other.trained is not None
        for expert in keep.nonzero()[:, 0].tolist():
            here = expert if state.local is None else int(state.local[expert])
            for name in state.trained.names:
                own, theirs = state.trained.leaves[name][here].grad, other.trained.leaves[name][expert].grad
                assert (own is None) == (theirs is None)
                if own is not None:
                    torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-6)


def test_merged_experts_go_with_the_residents_and_only_residents_count_tokens(tmp_path: Any) -> None:
    model = MoEModel(saved("mixtral", tmp_path))
    resident = [torch.arange(number) < 1 for number in model.num_experts]
    model.set_resident(resident, [1] * len(resident))
    model.stand_in(mixtures_of(model, resident), payload.global_tensors(model))
    assert [state.merged.number for state in model.states if state.merged is not None] == [2] * len(resident)
    batch = inputs(model.model)
    model.watch(TokenMasks(batch["attention_mask"]))
    model.model(**batch)
    for routing, state in zip(model.routing, model.states, strict=True):
        assert routing.evidence is not None
        assert routing.tokens is not None
        tokens = int(batch["attention_mask"].sum()) * state.layer.top_k
        assert int(routing.evidence.routed.sum()) == tokens  # what the router chose, among all experts
        assert int(routing.tokens.sum()) == int(routing.evidence.routed[0]) < tokens
    model.set_resident(None)
    assert all(state.merged is None for state in model.states)
    with pytest.raises(ValueError, match="needs 2 for each token"):
        model.set_resident(resident)
