"""What a watched batch shows of the experts, against its definition."""

import math

import pytest
import torch
from torch import Tensor

from hfedmoe.method.scores import score
from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.routing.tokens import TokenMasks
from tests.families.table import build, inputs
from tests.moe.test_kernel import gate, losses


def test_taylor_is_minus_gate_times_its_gradient_and_padding_is_left_out() -> None:
    """Scaling what expert e gives by 1 - eps raises the loss by eps * taylor(e)."""
    model = MoEModel(build("mixtral"), experts="frozen")
    x = inputs(model.model)
    routing, state = model.routing[-1], model.states[-1]
    model.watch(TokenMasks(x["attention_mask"]), "taylor")
    model.model(**x).logits.logsumexp(-1).sum().backward()  # padding has a loss, too, but does not count
    assert routing.evidence is not None
    found = routing.evidence.taylor
    assert found is not None
    model.watch(None)
    honest, keep, eps = state.compute, x["attention_mask"].reshape(-1, 1), 0.05

    def loss(expert: int, less: float) -> Tensor:
        state.compute = lambda h, i, w: honest(h, i, w * (1 - less * (i == expert) * keep))  # type: ignore[method-assign]
        with torch.no_grad():
            return model.model(**x).logits.double().logsumexp(-1).sum()

    rises = [(loss(expert, eps) - loss(expert, -eps)) / (2 * eps) for expert in range(state.layer.num_experts)]
    torch.testing.assert_close(found.double(), torch.stack(rises), atol=5e-3, rtol=1e-2)
    assert found.abs().max() > 0.1


def test_taylor_survives_recomputed_activations() -> None:
    seen = []
    for again in (False, True):
        model = MoEModel(build("mixtral"))
        if again:
            model.checkpoint_activations()
        x = inputs(model.model)
        model.watch(TokenMasks(x["attention_mask"]), "taylor")
        model.model(**x).logits.float().logsumexp(-1)[x["attention_mask"].bool()].sum().backward()
        seen.append(torch.stack([routing.evidence.taylor for routing in model.routing]))  # type: ignore[union-attr,misc]
    torch.testing.assert_close(*seen)
    assert seen[0].isfinite().all()


@pytest.mark.parametrize("limited", [False, True])
def test_activation_is_the_gate_times_the_norm_of_what_ran(limited: bool) -> None:
    model = MoEModel(build("mixtral"), experts="frozen")
    routing = model.routing[0]
    if limited:
        routing.choose = lambda layer, evidence, hit: torch.arange(len(hit)) < 3
    x, seen, honest = inputs(model.model), [], routing.state.compute

    def spy(*arguments: Tensor) -> Tensor:
        seen.append(arguments)
        return honest(*arguments)

    routing.state.compute = spy  # type: ignore[method-assign,assignment]
    model.watch(TokenMasks(x["attention_mask"]), "activation")
    with torch.no_grad():
        model.model(**x)
        (hidden, index, weights), keep = seen[0], x["attention_mask"].reshape(-1)
        up, down = (routing.state.tensors()[name] for name in ("up", "down"))
        expected, squares, number = torch.zeros(3, len(up))
        for token, slot in torch.cartesian_prod(torch.arange(len(hidden)), torch.arange(index.shape[1])).tolist():
            expert = int(index[token, slot])
            out = down[expert] @ gate((up[expert] @ hidden[token])[None])[0]
            expected[expert] += keep[token] * weights[token, slot] * out.norm()
            squares[expert] += (keep[token] * weights[token, slot] * out.norm()) ** 2
            number[expert] += keep[token]
    if limited:
        expected[3:] = squares[3:] = math.nan
    assert routing.evidence is not None
    torch.testing.assert_close(routing.evidence.squares, squares, equal_nan=True, atol=1e-4, rtol=1e-4)
    assert torch.equal(routing.evidence.processed, number)
    torch.testing.assert_close(score("reap", routing.evidence), expected / number, equal_nan=True, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(routing.evidence.activation, expected, equal_nan=True, atol=1e-4, rtol=1e-4)


def test_token_level_evidence_has_a_row_per_token_that_counts() -> None:
    model = MoEModel(build("mixtral"))
    x, routing, found = inputs(model.model), model.routing[0], []
    for routing.token_level in (False, True):
        model.watch(TokenMasks(x["attention_mask"]))
        model.model(**x)
        assert routing.evidence is not None
        found.append(routing.evidence.g)
    lengths = x["attention_mask"].sum(1).tolist()
    assert len(found[1]) == sum(lengths)
    torch.testing.assert_close(torch.stack([part.mean(0) for part in found[1].split(lengths)]), found[0])


def test_shares_sum_to_one_also_where_experts_are_looked_up_by_token() -> None:
    model = MoEModel(build("deepseek_v4"))
    x = inputs(model.model)
    model.watch(TokenMasks(x["attention_mask"]))
    model.model(**x)
    assert any(routing.layer.fixed_routing for routing in model.routing)
    fixed = next(routing for routing in model.routing if routing.layer.fixed_routing)
    for name, table in fixed.layer.router.named_buffers():
        if not table.is_floating_point():
            table.zero_()  # as transformers begins: every token is bound to expert 0, twice
            assert name
    model.watch(TokenMasks(x["attention_mask"]))
    model.model(**x)
    assert fixed.evidence is not None
    assert (fixed.evidence.g[:, 0] == 1).all()
    for routing in model.routing:
        assert routing.evidence is not None
        torch.testing.assert_close(routing.evidence.g.sum(1), torch.ones(len(routing.evidence.g)))


def test_the_gate_learns_the_same_from_experts_over_the_budget() -> None:
    """Of the last layer: what lies below it gets nothing through frozen experts, but its own gate does."""

    def freeze(model: MoEModel) -> None:
        model.states[-1].trainable = torch.arange(6) < 3

    free, frozen = MoEModel(build("mixtral")), MoEModel(build("mixtral"))
    losses(free, lambda model: None)
    losses(frozen, freeze)
    name = list(free.routers)[-1]
    torch.testing.assert_close(frozen.routers[name].grad, free.routers[name].grad, atol=1e-4, rtol=1e-4)


def test_layers_begin_with_lora_of_their_own_within_its_bound() -> None:
    model = MoEModel(build("mixtral"))
    first, second = (state.trained.stacks["up_a"] for state in model.states[:2])  # type: ignore[union-attr]
    assert not torch.equal(first, second)
    assert 0.95 < float(first.abs().max()) * first.shape[2] ** 0.5 <= 1
