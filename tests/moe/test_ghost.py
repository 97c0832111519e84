"""The ghost norm: what each token's gradient of the down projection would be, without computing it."""

import pytest
import torch
from torch import Tensor

from hfedmoe.moe.experts import matmul, state
from hfedmoe.moe.experts.activation import Gate
from hfedmoe.moe.experts.frozen import SeparateBase, SharedBase, base_of
from hfedmoe.moe.experts.groups import group_pairs
from hfedmoe.moe.experts.kernel import LORA, ExpertMath, experts_forward
from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.routing.tokens import TokenMasks
from tests.families.table import build, inputs
from tests.moe.test_kernel import WIDTH, E, K, T, gate, problem

FAMILIES = ["mixtral", "olmoe", "deepseek_v3", "llama4_text", "gpt_oss"]
"""Softmax with and without renormalisation; sigmoid; weights on the input; biases and transposed matrices."""


def ghosts(model: MoEModel, x: dict[str, Tensor], *measures: str) -> list[Tensor]:
    """Of every layer, for a loss of which padding has no part."""
    model.watch(TokenMasks(x["attention_mask"]), *measures)
    model.model(**x).logits.float().logsumexp(-1)[x["attention_mask"].bool()].sum().backward()
    return [routing.evidence.ghost for routing in model.routing]  # type: ignore[union-attr,misc]


def single_tokens(number: int = 12) -> dict[str, Tensor]:
    ids = torch.randint(3, 61, (number, 1), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("family", FAMILIES)
def test_is_the_sum_of_squared_gradients_of_single_tokens(family: str) -> None:
    """Of texts of one token each, autograd gives each token's gradient of the trained down projection."""
    x = single_tokens()
    found = ghosts(MoEModel(build(family).eval(), experts="frozen"), x, "ghost")
    expected = [torch.zeros_like(values) for values in found]
    model = MoEModel(build(family).eval(), experts="full")
    for ids in x["input_ids"]:
        model.model(input_ids=ids[None]).logits.float().logsumexp(-1).sum().backward()
        for total, own in zip(expected, model.states, strict=True):
            for expert, leaf in enumerate(own.trained.leaves["down"]):  # type: ignore[union-attr]
                if leaf.grad is not None:
                    total[expert] += leaf.grad.square().sum()
                leaf.grad = None
    for one, other in zip(found, expected, strict=True):
        assert (other > 0).sum() > 1
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_experts_over_the_activation_budget_are_measured_unless_they_are_skipped() -> None:
    x = inputs(build("mixtral"))
    free = ghosts(MoEModel(build("mixtral")), x, "ghost")[-1]
    for off_budget in ("frozen", "skip"):
        model = MoEModel(build("mixtral"), off_budget=off_budget)
        # In the last layer only: below it, frozen experts pass no gradient on.
        model.routing[-1].choose = lambda layer, evidence, hit: torch.arange(len(hit)) < 3
        found = ghosts(model, x, "ghost")[-1]
        if off_budget == "frozen":
            torch.testing.assert_close(found, free)
            assert not any(model.trained_now()[-1][3:])
        else:
            assert found[3:].isnan().all()
            assert found[:3].isfinite().all()


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("beside", [(), ("activation", "taylor")])
def test_survives_recomputed_activations_and_other_measures(beside: tuple[str, ...], recomputed: bool) -> None:
    """With "activation", every pair is computed as a token of its own."""
    model, expected = MoEModel(build("mixtral")), ghosts(MoEModel(build("mixtral")), inputs(build("mixtral")), "ghost")
    if recomputed:
        model.checkpoint_activations()
    found = ghosts(model, inputs(model.model), "ghost", *beside)
    for one, other in zip(found, expected, strict=True):
        assert (other > 0).any()
        torch.testing.assert_close(one, other)


def test_in_16_bit_the_norms_are_float32_and_near() -> None:
    exact, model = ghosts(MoEModel(build("mixtral")), inputs(build("mixtral")), "ghost"), MoEModel(build("mixtral"))
    with torch.autocast("cpu", torch.bfloat16):
        found = ghosts(model, inputs(model.model), "ghost")
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.float32
        assert torch.cosine_similarity(one, other, dim=0) > 0.98


def test_is_not_measured_without_a_gradient_or_of_absent_experts() -> None:
    model = MoEModel(build("mixtral"))
    x = inputs(model.model)
    model.set_resident([torch.arange(number) < 3 for number in model.num_experts])
    for values in ghosts(model, x, "ghost"):
        assert values[:3].isfinite().all()
        assert values[3:].isnan().all()
    model.watch(TokenMasks(x["attention_mask"]), "ghost")
    with torch.no_grad():
        model.model(**x)
    assert all(routing.evidence.ghost.isnan().all() for routing in model.routing)  # type: ignore[union-attr]


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_both_ways_to_multiply_give_the_same_norms(
    shared: bool, silu: bool, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the inner activations, with LoRA on the up projection: one grouped product, or one per expert."""
    if not grouped:
        monkeypatch.setattr(matmul, "has_kernel", lambda groups, *operands: False)
    p = {name: value.float() if value.is_floating_point() else value for name, value in problem().items()}
    if shared:
        p["up"], p["down"] = (p[name][:1].expand(E, *p[name].shape[1:]) for name in ("up", "down"))
    math = ExpertMath(base_of(p["up"], p["down"]), Gate(gate, silu), scale=1.5)
    assert isinstance(math.base, SharedBase if shared else SeparateBase)
    groups, norms = group_pairs(p["index"].reshape(-1), E, K), torch.zeros(T * K)
    leaves = [p[name][e] for e, _, _ in groups.spans for name in LORA]
    experts_forward(math, p["x"], p["weights"].reshape(-1), groups, {name: p[name] for name in LORA}, leaves, norms)
    for pair, expert in enumerate(p["index"].reshape(-1).tolist()):
        expected = torch.zeros(WIDTH)
        if expert < E:  # a pair without an expert stays 0
            up = p["up"][expert] + 1.5 * p["up_b"][expert] @ p["up_a"][expert]
            expected = gate((up @ p["x"][pair // K])[None])[0] * p["weights"].reshape(-1)[pair]
        torch.testing.assert_close(norms[pair], expected.norm())


def test_worked_by_hand() -> None:
    """One expert, the identity between its projections, two tokens."""
    up, down = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[1.0, 1.0]]])
    x = torch.tensor([[3.0, 2.0], [0.0, 1.0]])  # a = [3, 4] and [0, 2]: norms 5 and 2
    weights = torch.tensor([0.5, 1.0])
    norms = torch.zeros(2)
    math = ExpertMath(base_of(up, down), Gate(lambda u: u))
    experts_forward(math, x, weights, group_pairs(torch.tensor([0, 0]), 1, 1), {}, [], norms)
    assert norms.tolist() == [2.5, 2.0]
    reported: list[Tensor] = []
    own = object.__new__(state.ExpertState)
    own.gradients = reported.append
    y = torch.zeros(2, 1, requires_grad=True) * 1.0
    own._report_gradients(y, norms[:, None])
    (y * torch.tensor([[4.0], [-3.0]])).sum().backward()  # dL/dy = 4 and -3
    assert reported[0].tolist() == [[10.0], [6.0]]  # squared and added up: 136
