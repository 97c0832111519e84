import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hfedmoe.method.aggregation import (
    EXPERT_RULES,
    MeanAverage,
    expert_weights,
    gate_alpha_numerator,
    gate_row_weights,
    gate_weights,
    passes,
    raw_gate_alpha,
    routing_consistency,
    usage,
)

# Two clients, four experts, tau = 1/2: the threshold is 1/8. S_0 = {0, 1}, S_1 = {1, 2}, S = {0, 1, 2}.
USAGE = torch.tensor([[0.6, 0.3, 0.1, 0.0], [0.1, 0.4, 0.5, 0.0]])
IMPORTANCE = torch.tensor([[0.7, 0.4, 0.2, 0.1], [0.2, 0.5, 0.6, 0.1]])
TAU = 0.5
# p_0 = 0.42, 0.12; p_1 = 0.20, 0.30
ALPHA = torch.tensor([0.54, 0.50])


@st.composite
def clients(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    count, experts, seed = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    u = (torch.randn(count, experts, generator=generator) * 3).softmax(-1)
    return u, torch.rand(count, experts, generator=generator)


def test_usage_is_the_mean_over_samples():
    torch.testing.assert_close(usage(torch.tensor([[1.0, 0.0], [0.5, 0.5]])), torch.tensor([0.75, 0.25]))


def test_the_threshold_is_a_multiple_of_the_uniform_share():
    assert passes(USAGE, TAU).tolist() == [[True, True, False, False], [False, True, True, False]]
    assert passes(torch.full((4,), 0.25), 1.0).all()  # exactly the threshold passes
    assert passes(USAGE, 0.0).all()
    assert not passes(torch.tensor([1.0, 0.0]), 2.1).any()  # more than E: nothing can pass


def test_gates_hand_worked():
    torch.testing.assert_close(routing_consistency(USAGE, TAU), torch.tensor([2 / 3, 2 / 3]))
    torch.testing.assert_close(raw_gate_alpha(USAGE, IMPORTANCE, TAU), ALPHA / 3)
    torch.testing.assert_close(gate_weights(USAGE, IMPORTANCE, TAU), ALPHA / 1.04)
    torch.testing.assert_close(gate_alpha_numerator(USAGE[0], IMPORTANCE[0], TAU), torch.tensor(0.54))
    trained = torch.tensor([True, False, True, True])
    torch.testing.assert_close(
        gate_row_weights(USAGE[0], IMPORTANCE[0], trained, TAU), torch.tensor([0.42, 0.0, 0.0, 0.0])
    )


def test_tau_extremes():
    # tau = 0: everything counts, alpha = u . s: .42 + .12 + .02 and .02 + .20 + .30
    torch.testing.assert_close(raw_gate_alpha(USAGE, IMPORTANCE, 0.0), torch.tensor([0.56, 0.52]) / 4)
    assert torch.equal(routing_consistency(USAGE, 0.0), torch.ones(2))
    # tau > E: S is empty
    assert torch.equal(routing_consistency(USAGE, 4.5), torch.zeros(2))
    assert torch.equal(raw_gate_alpha(USAGE, IMPORTANCE, 4.5), torch.zeros(2))
    assert torch.equal(gate_weights(USAGE, IMPORTANCE, 4.5), torch.tensor([0.5, 0.5]))
    examples = torch.tensor([30, 10])
    assert torch.equal(gate_weights(USAGE, IMPORTANCE, 4.5, examples), torch.tensor([0.75, 0.25]))
    assert torch.equal(gate_weights(USAGE, IMPORTANCE, 4.5, torch.zeros(2)), torch.tensor([0.5, 0.5]))
    assert not torch.equal(gate_weights(USAGE, IMPORTANCE, TAU, examples), torch.tensor([0.75, 0.25]))


@given(clients(), st.floats(0, 8))
@settings(max_examples=60, deadline=None)
def test_gate_weights_sum_to_one_and_stream(data: tuple[Tensor, Tensor], tau: float):
    u, s = data
    weights = gate_weights(u, s, tau)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
    # Streaming with the unnormalised weight of each client, and the fallback, gives the same gate (eq. 21).
    gates = torch.randn(len(u), 3, 2, generator=torch.Generator().manual_seed(0))
    by_importance, uniform = MeanAverage(), MeanAverage()
    for c in range(len(u)):
        by_importance.add(gates[c], gate_alpha_numerator(u[c], s[c], tau))
        uniform.add(gates[c], 1.0)
    streamed = by_importance.result(previous=uniform.result(previous=torch.zeros(3, 2)))
    torch.testing.assert_close(streamed, torch.einsum("c,cij->ij", weights, gates), atol=1e-5, rtol=1e-5)


@given(clients(), st.floats(0, 3), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_the_order_of_experts_does_not_matter_to_gates(data: tuple[Tensor, Tensor], tau: float, seed: int):
    u, s = data
    order = torch.randperm(u.shape[1], generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(gate_weights(u[:, order], s[:, order], tau), gate_weights(u, s, tau))
    assert torch.equal(routing_consistency(u[:, order], tau), routing_consistency(u, tau))
    trained = u[0] > 0.2
    vectors = (u[0], s[0], u[0] * 50, trained)
    for rule in EXPERT_RULES:
        permuted = expert_weights(rule, 9, *(v[order] for v in vectors), tau)
        assert torch.equal(permuted, expert_weights(rule, 9, *vectors, tau)[order])


def test_expert_weights_hand_worked():
    tokens, trained = torch.tensor([40, 20, 9, 5]), torch.tensor([True, False, True, True])
    # expert 1 was not trained; experts 2 and 3 are below the threshold
    for rule, expected in {"samples": 50.0, "tokens": 40.0, "importance": 50 * 0.7}.items():
        weights = expert_weights(rule, 50, USAGE[0], IMPORTANCE[0], tokens, trained, TAU)
        torch.testing.assert_close(weights, torch.tensor([expected, 0.0, 0.0, 0.0]))
    everyone = expert_weights("samples", 50, USAGE[0], IMPORTANCE[0], tokens, torch.ones(4, dtype=torch.bool), 0.0)
    assert torch.equal(everyone, torch.full((4,), 50.0))
    assert not expert_weights("samples", 50, USAGE[0], IMPORTANCE[0], tokens, trained, 4.5).any()


def test_errors():
    args = (USAGE[0], IMPORTANCE[0], torch.ones(4), torch.ones(4, dtype=torch.bool), TAU)
    with pytest.raises(ValueError, match="known: samples, tokens, importance"):
        expert_weights("votes", 5, *args)
    with pytest.raises(ValueError, match="num_examples=-1"):
        expert_weights("samples", -1, *args)
    with pytest.raises(ValueError, match=r"all be \[..., E\]"):
        expert_weights("samples", 5, USAGE[0][:3], *args[1:])
    with pytest.raises(ValueError, match="tau"):
        passes(USAGE, -0.1)
    with pytest.raises(ValueError, match="tau"):
        passes(USAGE, float("nan"))
    with pytest.raises(ValueError, match="at least one client"):
        gate_weights(USAGE[:0], IMPORTANCE[:0], TAU)
    with pytest.raises(ValueError, match="num_examples"):
        gate_weights(USAGE, IMPORTANCE, TAU, torch.tensor([1]))
    with pytest.raises(ValueError, match="finite"):
        gate_weights(USAGE, -IMPORTANCE, TAU)
    with pytest.raises(ValueError, match="differ in shape"):
        gate_alpha_numerator(USAGE[0], IMPORTANCE, TAU)
