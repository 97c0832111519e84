import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hfedmoe.method.importance import (
    cumulative,
    ib_contribution,
    importance,
    redundancy,
    routing_probabilities,
    sample_mean,
    specific,
)

LOG2 = math.log(2)
# Two samples, three experts. Column means: 1/2, 3/8, 1/8; maxima: 1/2, 1/2, 1/4.
G = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.25, 0.25]])


@st.composite
def routings(draw: st.DrawFn) -> Tensor:
    samples, experts, seed = draw(st.integers(1, 6)), draw(st.integers(1, 8)), draw(st.integers(0, 10_000))
    sharpness = draw(st.sampled_from([0.1, 1.0, 10.0, 200.0]))  # 200: rows with exact zeros
    return (torch.randn(samples, experts, generator=torch.Generator().manual_seed(seed)) * sharpness).softmax(-1)


def test_hand_worked():
    torch.testing.assert_close(cumulative(G), torch.tensor([1 / 2, 3 / 8, 1 / 8]))
    torch.testing.assert_close(specific(G), torch.tensor([1 / 2, 1 / 2, 1 / 4]))
    # lam = 1/4: 1/4 * mean + 3/4 * max = 1/2, 3/32 + 12/32, 1/32 + 6/32
    torch.testing.assert_close(importance(G, lam=0.25), torch.tensor([1 / 2, 15 / 32, 7 / 32]))
    # expert 1: (1/2 log(4/3) + 1/4 log(2/3)) / 2; expert 2: (0 + 1/4 log 2) / 2
    one = (0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)) / 2
    torch.testing.assert_close(redundancy(G), torch.tensor([0.0, one, LOG2 / 8]))
    expected = torch.tensor([1 / 2, 15 / 32 - 2 * one, 7 / 32 - 2 * LOG2 / 8])
    torch.testing.assert_close(ib_contribution(G, lam=0.25, beta=2.0), expected)


def test_defaults_are_one_half():
    torch.testing.assert_close(importance(G), torch.tensor([1 / 2, 7 / 16, 3 / 16]))
    torch.testing.assert_close(ib_contribution(G), importance(G) - 0.5 * redundancy(G))


@given(routings())
@settings(max_examples=60, deadline=None)
def test_redundancy_is_finite_and_not_negative(g: Tensor):
    value = redundancy(g)
    assert value.isfinite().all()
    assert (value >= 0).all()
    # The Jensen gap of x log x, computed independently in float64.
    x = g.double()
    gap = torch.xlogy(x, x).mean(0) - torch.xlogy(x.mean(0), x.mean(0))
    torch.testing.assert_close(value.double(), gap, atol=1e-6, rtol=1e-5)


@given(routings(), st.integers(2, 5))
@settings(max_examples=30, deadline=None)
def test_redundancy_is_zero_when_all_samples_route_alike(g: Tensor, times: int):
    assert redundancy(g[:1].expand(times, -1)).max() < 1e-6
    assert (redundancy(g[:1]) == 0).all()


@given(routings(), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_ib_without_beta_is_importance(g: Tensor, lam: float):
    assert torch.equal(ib_contribution(g, lam, beta=0.0), importance(g, lam))


@given(routings(), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_permuting_experts_permutes_everything(g: Tensor, seed: int):
    order = torch.randperm(g.shape[1], generator=torch.Generator().manual_seed(seed))
    for function in (cumulative, specific, importance, redundancy, ib_contribution):
        torch.testing.assert_close(function(g[:, order]), function(g)[order])


def test_lam_extremes():
    assert torch.equal(importance(G, lam=1.0), cumulative(G))
    assert torch.equal(importance(G, lam=0.0), specific(G))


def test_bfloat16_is_computed_in_float32_and_without_graph():
    g = G.bfloat16().requires_grad_()  # these numbers are exact in bfloat16
    for function in (cumulative, specific, importance, redundancy, ib_contribution):
        assert function(g).dtype == torch.float32
        assert not function(g).requires_grad
        assert torch.equal(function(g), function(G))


def test_nothing_waits_for_the_device():
    g = torch.zeros(3, 4, device="meta")  # without values: reading one would raise
    for function in (cumulative, specific, importance, redundancy, ib_contribution):
        assert function(g).shape == (4,)


def test_tiny_probabilities_stay_finite():
    assert redundancy(torch.tensor([[1e-45, 1.0], [0.0, 1.0]])).isfinite().all()


@pytest.mark.parametrize("function", [cumulative, specific, importance, redundancy, ib_contribution])
def test_no_samples_is_an_error(function):
    with pytest.raises(ValueError, match="at least one sample"):
        function(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="at least one sample"):
        function(torch.zeros(4))


@pytest.mark.parametrize("lam", [-0.1, 1.1, float("nan")])
def test_lam_out_of_range_is_an_error(lam: float):
    with pytest.raises(ValueError, match="lam"):
        importance(G, lam)


def test_softmax_and_sigmoid_probabilities():
    logits = torch.tensor([[0.0, math.log(3.0)]])
    # softmax: 1/4, 3/4; sigmoid: 1/2 and 3/4, normalised 2/5 and 3/5
    torch.testing.assert_close(routing_probabilities(logits, "softmax"), torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(routing_probabilities(logits, "sigmoid"), torch.tensor([[0.4, 0.6]]))
    assert routing_probabilities(logits.bfloat16(), "sigmoid").dtype == torch.float32


def test_sigmoid_probabilities_survive_underflow():
    probabilities = routing_probabilities(torch.tensor([[-300.0, -300.0, -400.0], [-1e6, -1e6, -1e6]]), "sigmoid")
    torch.testing.assert_close(probabilities, torch.tensor([[0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]]))


def test_unknown_router_kind_is_an_error():
    with pytest.raises(ValueError, match="softmax, sigmoid"):
        routing_probabilities(torch.zeros(1, 2), "tanh")


def test_sample_mean_ignores_padding_and_drops_empty_samples():
    probabilities = torch.tensor([[0.2, 0.8], [0.6, 0.4], [1.0, 0.0], [1.0, 0.0], [float("nan"), 1.0], [0.0, 1.0]])
    keep = torch.tensor([[True, True], [False, False], [False, True]])
    # sample 0: mean of its two tokens; sample 1: padding only, dropped; sample 2: its one token
    expected = torch.tensor([[0.4, 0.6], [0.0, 1.0]])
    torch.testing.assert_close(sample_mean(probabilities, keep), expected)
    torch.testing.assert_close(sample_mean(probabilities, keep, torch.tensor([0, 2])), expected)
    assert sample_mean(probabilities, torch.zeros(3, 2, dtype=torch.bool)).shape == (0, 2)


def test_sample_mean_checks_shapes():
    with pytest.raises(ValueError, match="expected probabilities"):
        sample_mean(torch.zeros(3, 2), torch.ones(2, 1, dtype=torch.bool))
