"""Experts of a client's own: y = (1 - g) MoE(x) + g own(x), for every layout of experts."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hfedmoe.moe import payload
from hfedmoe.moe.experts.own import OwnExperts
from hfedmoe.moe.experts.trained import TrainedExperts
from hfedmoe.moe.model import MoEModel
from tests.families.table import CORE, inputs
from tests.moe.test_carving import opened, saved


def test_the_gate_mixes_token_by_token() -> None:
    pairs = TrainedExperts({"up_a": torch.zeros(1, 1, 2), "up_b": torch.zeros(1, 3, 1)})
    own = OwnExperts("copy", pairs, torch.device("cpu"))
    hidden, theirs, mine = torch.tensor([[1.0, 0.0], [0.0, 9.0]]), torch.zeros(2, 2), torch.full((2, 2), 8.0)
    assert own.mixed(theirs, mine, hidden).tolist() == [[4.0, 4.0]] * 2  # the gate of a copy begins in the middle
    with torch.no_grad():
        own.weight.copy_(torch.tensor([-100.0, 100.0]))
    assert own.mixed(theirs, mine, hidden).tolist() == [[0.0, 0.0], [8.0, 8.0]]
    assert not own.begun
    graft = OwnExperts("graft", pairs, torch.device("cpu"))
    assert graft.mixed(theirs, mine, 0 * hidden)[0].tolist() == pytest.approx([8 * 0.1192] * 2, abs=1e-3)


def started(model: MoEModel, expert: int) -> None:
    """Random pairs and gates, as after some training, and a beginning with this expert."""
    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for state in model.states:
            assert state.own is not None
            state.own.weight.normal_(generator=draws)
            state.own.expert.fill_(expert)
            for stack in state.own.trained.stacks.values():
                stack.copy_(torch.randn(stack.shape, generator=draws) * 0.1)


def routed(state: Any, expert: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Six tokens with the router's choice among all experts, or all to one expert."""
    draws = torch.Generator().manual_seed(4)
    width = state.own.weight.shape[0]
    hidden = torch.randn(6, width, generator=draws)
    scores = torch.rand(6, state.layer.num_experts, generator=draws)
    weights, index = scores.topk(state.layer.top_k, dim=1)
    if expert is not None:
        return hidden, torch.full((6, 1), expert), torch.ones(6, 1)
    return hidden, index, weights


@pytest.mark.parametrize("carved", [False, True])
@pytest.mark.parametrize("family", CORE)
def test_a_graft_is_one_expert_with_pairs_of_its_own(family: str, carved: bool, tmp_path: Any) -> None:
    model = MoEModel(saved(family, tmp_path), experts="frozen", own="graft")
    if carved:
        model = opened(tmp_path, experts="frozen", own="graft")
        model.set_resident(None)
    started(model, 1)
    for state in model.states:
        own, number = state.own, state.layer.num_experts
        assert own is not None
        hidden, index, weights = routed(state)
        out = state(hidden, index, weights)
        state.own = None
        theirs = state(hidden, index, weights)
        state.trained = TrainedExperts(  # the same pairs on the layer's own copy of the expert
            {name: stack.expand(number, -1, -1) for name, stack in own.trained.stacks.items()}, own.trained.scale
        )
        mine = state(*routed(state_with(state, own), 1))
        gate = torch.sigmoid(hidden @ own.weight + own.bias)[:, None]
        torch.testing.assert_close(out, (1 - gate) * theirs + gate * mine, rtol=1e-4, atol=1e-5)
        out.square().sum().backward()
        assert all(leaf.grad is not None and bool(leaf.grad.any()) for leaf in own.parameters())


def state_with(state: Any, own: OwnExperts) -> Any:
    """What `routed` reads of a state whose own experts were taken away."""
    from types import SimpleNamespace

    return SimpleNamespace(own=own, layer=state.layer)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "switch_transformers"])
def test_a_copy_is_all_experts_with_pairs_of_its_own(family: str, tmp_path: Any) -> None:
    model = MoEModel(saved(family, tmp_path), own="copy")
    started(model, 0)
    for state in model.states:
        own = state.own
        assert own is not None
        hidden, index, weights = routed(state)
        out = state(hidden, index, weights)
        state.own = None
        theirs = state(hidden, index, weights)
        state.trained = own.trained
        mine = state(hidden, index, weights)
        gate = torch.sigmoid(hidden @ own.weight + own.bias)[:, None]
        torch.testing.assert_close(out, (1 - gate) * theirs + gate * mine, rtol=1e-4, atol=1e-5)
        assert not torch.equal(theirs, mine)


@pytest.mark.parametrize("kind", ["copy", "graft"])
def test_before_the_client_begins_nothing_changes_and_everything_is_sent_by_name(kind: Any, tmp_path: Any) -> None:
    plain, model = MoEModel(saved("mixtral", tmp_path)), MoEModel(saved("mixtral", tmp_path), own=kind)
    batch = inputs(model.model)
    assert torch.equal(model.model(**batch).logits, plain.model(**batch).logits)
    tensors = payload.global_tensors(model)
    assert {name.split(".")[0] for name in tensors} == {"router", "experts", "own"}
    rows = model.num_experts[0] if kind == "copy" else 1
    assert tensors["own.0.up_a"].shape[0] == rows
    assert float(tensors["own.0.expert"]) == -1
    started(model, 0)
    assert not torch.equal(model.model(**batch).logits, plain.model(**batch).logits)
    payload.load_all(model, tensors)
    assert torch.equal(model.model(**batch).logits, plain.model(**batch).logits)


def test_padding_does_not_train_a_graft(tmp_path: Any) -> None:
    model = MoEModel(saved("mixtral", tmp_path), experts="frozen", own="graft")
    started(model, 2)
    state = model.states[0]
    assert state.own is not None
    hidden, index, weights = routed(state)
    state.counted = torch.tensor([True, True, True, False, False, False])
    grads = []
    for changed in (0.0, 5.0):
        hidden = hidden.clone()
        hidden[3:] += changed
        state(hidden, index, weights)[:3].square().sum().backward()
        grads.append([leaf.grad.clone() for leaf in state.own.trained.parameters() if leaf.grad is not None])
        for leaf in state.own.trained.parameters():
            leaf.grad = None
        rows = state(hidden, index, weights)[3:]
        assert not rows.any()  # neither the layer nor the graft works on padding
    assert len(grads[0]) == 4
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_a_graft_of_another_expert_is_made_anew(tmp_path: Any) -> None:
    model = MoEModel(saved("mixtral", tmp_path), experts="frozen", own="graft")
    outs = []
    for expert in (0, 1, 0):
        started(model, expert)
        outs.append(model.states[0](*routed(model.states[0])))
    assert torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0], outs[1])
