import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hfedmoe.method.copies import Copies, over_layers
from hfedmoe.method.gates import GateAverage, RoutingConsistency, gate_mass, gate_row_weights
from hfedmoe.method.usage import EXPERT_WEIGHTS, ClientUsage, FederationUsage, expert_weights, kept_weights, passes

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


def copies(
    usage: Tensor, importance: Tensor, tokens: Tensor | None = None, trained: Tensor | None = None, examples: int = 1
) -> Copies:
    everyone = torch.ones(usage.shape, dtype=torch.bool)
    held = everyone if trained is None else trained
    return Copies(examples, usage, importance, torch.ones_like(usage) if tokens is None else tokens, everyone, held)


def gate_weights(usage: Tensor, importance: Tensor, tau: float, examples: Tensor) -> Tensor:
    """The oracle: weights of all clients' gates at once, [C, E], [C, E], [C] -> [C], eq. 19-21 with their fallback."""
    used = usage >= tau / usage.shape[1]
    alpha = torch.where(used, usage * importance, 0.0).sum(1) / used.any(0).sum().clamp_min(1)  # eq. 19, 20
    alpha = examples.float() if alpha.sum() == 0 else alpha
    return alpha / alpha.sum()


def routing_consistency(usage: Tensor, tau: float) -> Tensor:
    """The oracle: r(c) of all clients at once, [C, E] -> [C], eq. 18."""
    used = usage >= tau / usage.shape[1]
    return used.sum(1).float() / used.any(0).sum().clamp_min(1)


def test_usage_is_the_mean_over_samples_not_over_batches():
    running = ClientUsage(2)
    assert torch.equal(running.value(), torch.zeros(2))
    for batch in (torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.zeros(0, 2), torch.tensor([[0.0, 1.0]])):
        running.add(batch)
    torch.testing.assert_close(running.value(), torch.tensor([0.5, 0.5]))


def test_the_federations_usage_counts_examples():
    mean = FederationUsage()
    assert mean.value() is None
    mean.add(torch.tensor([1.0, 0.0]), 1)
    mean.add(torch.tensor([0.0, 1.0]), 3)
    assert torch.equal(mean.value(), torch.tensor([0.25, 0.75]))


def test_the_threshold_is_a_multiple_of_the_uniform_share():
    assert passes(USAGE, TAU).tolist() == [[True, True, False, False], [False, True, True, False]]
    assert passes(torch.full((4,), 0.25), 1.0).all()  # exactly the threshold passes
    assert passes(USAGE, 0.0).all()
    assert not passes(torch.tensor([1.0, 0.0]), 2.1).any()  # more than E: nothing can pass


def test_gates_hand_worked():
    torch.testing.assert_close(gate_weights(USAGE, IMPORTANCE, TAU, torch.ones(2)), ALPHA / 1.04)
    torch.testing.assert_close(gate_mass(copies(USAGE, IMPORTANCE), TAU), ALPHA)
    trained = torch.tensor([True, False, True, True])
    torch.testing.assert_close(
        gate_row_weights(copies(USAGE[0], IMPORTANCE[0], trained=trained), TAU), torch.tensor([0.42, 0.0, 0.0, 0.0])
    )
    # tau = 0: everything counts: .42 + .12 + .02 and .02 + .20 + .30
    torch.testing.assert_close(gate_mass(copies(USAGE, IMPORTANCE), 0.0), torch.tensor([0.56, 0.52]))
    assert torch.equal(gate_mass(copies(USAGE, IMPORTANCE), 4.5), torch.zeros(2))  # tau > E: S is empty


def streamed_consistency(usage: Tensor, tau: float) -> list[float]:
    """Of clients [C, E] of one layer that come one after the other."""
    stream = RoutingConsistency([usage.shape[1]], tau)
    counts = [stream.add([client]) for client in usage]
    return [stream.value(count) for count in counts]


def test_routing_consistency_hand_worked():
    assert streamed_consistency(USAGE, TAU) == pytest.approx([2 / 3, 2 / 3])
    assert streamed_consistency(USAGE, 0.0) == [1.0, 1.0]
    assert streamed_consistency(USAGE, 4.5) == [0.0, 0.0]


@given(clients(), st.floats(0, 8), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_clients_that_come_one_after_the_other_give_what_all_at_once_give(
    data: tuple[Tensor, Tensor], tau: float, seed: int
):
    u, s = data
    draws = torch.Generator().manual_seed(seed)
    gates = torch.randn(len(u), 3, 2, generator=draws)
    examples = torch.randint(1, 9, (len(u),), generator=draws)
    stream = GateAverage()
    for c in range(len(u)):
        stream.add(gates[c], float(gate_mass(copies(u[c], s[c]), tau)), int(examples[c]))
    expected = torch.einsum("c,cij->ij", gate_weights(u, s, tau, examples), gates)  # eq. 21
    torch.testing.assert_close(stream.result(torch.zeros(3, 2)), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(streamed_consistency(u, tau)), routing_consistency(u, tau))


def test_a_gate_that_nobody_sent_keeps_its_bits():
    before = torch.tensor([0.1, 0.3])
    assert torch.equal(GateAverage().result(before), before)


@given(clients(), st.floats(0, 3), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_the_order_of_experts_does_not_matter(data: tuple[Tensor, Tensor], tau: float, seed: int):
    u, s = data
    order = torch.randperm(u.shape[1], generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(gate_mass(copies(u[:, order], s[:, order]), tau), gate_mass(copies(u, s), tau))
    vectors = (u[0], s[0], u[0] * 50, u[0] > 0.2)
    for rule in EXPERT_WEIGHTS:
        permuted = expert_weights(rule, copies(*(v[order] for v in vectors), examples=9), tau)
        assert torch.equal(permuted, expert_weights(rule, copies(*vectors, examples=9), tau)[order])


def test_with_eq_17_off_a_client_counts_for_every_expert():
    own = copies(USAGE[0], IMPORTANCE[0], trained=torch.tensor([True, False, True, True]), examples=50)
    assert torch.equal(expert_weights("all", own, 4.5), torch.tensor([50.0, 0.0, 50.0, 50.0]))  # whatever the threshold
    kept = kept_weights("all", own)
    assert kept is not None
    assert torch.equal(kept, torch.tensor([0.0, 50.0, 0.0, 0.0]))


def test_expert_weights_hand_worked():
    tokens, trained = torch.tensor([40.0, 20, 9, 5]), torch.tensor([True, False, True, True])
    own = copies(USAGE[0], IMPORTANCE[0], tokens, trained, examples=50)
    # expert 1 was not trained; experts 2 and 3 are below the threshold
    assert kept_weights("samples", own) is None
    for rule, expected in {"samples": 50.0, "tokens": 40.0, "importance": 50 * 0.7}.items():
        torch.testing.assert_close(expert_weights(rule, own, TAU), torch.tensor([expected, 0.0, 0.0, 0.0]))
    everyone = copies(USAGE[0], IMPORTANCE[0], examples=50)
    assert torch.equal(expert_weights("samples", everyone, 0.0), torch.full((4,), 50.0))
    assert not expert_weights("samples", own, 4.5).any()


def test_layers_of_different_sizes_are_weighed_one_by_one():
    small, large = (copies(torch.full((n,), 1 / n), torch.ones(n), examples=n) for n in (2, 3))
    assert [w.tolist() for w in over_layers(lambda c: expert_weights("samples", c, 0.1), [small, large])] == [
        [2.0, 2.0],
        [3.0, 3.0, 3.0],
    ]
    alike = over_layers(lambda c: gate_mass(c, 0.1), [small, small])
    assert [float(alpha) for alpha in alike] == [1.0, 1.0]


def test_errors():
    with pytest.raises(ValueError, match="known: samples, tokens, importance"):
        expert_weights("votes", copies(USAGE[0], IMPORTANCE[0]), TAU)
    with pytest.raises(ValueError, match="examples=-1"):
        copies(USAGE[0], IMPORTANCE[0], examples=-1)
    with pytest.raises(ValueError, match=r"all be \[..., E\]"):
        copies(USAGE[0], IMPORTANCE)
    for tau in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="tau"):
            passes(USAGE, tau)
