import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hfedmoe.method.selection import activation, select

SCORES = torch.tensor([[0.9, 0.1, 0.5], [0.4, 0.3, 0.2]])


def bits(*rows: str) -> Tensor:
    return torch.tensor([[mark == "x" for mark in row] for row in rows])


@st.composite
def layers(draw: st.DrawFn) -> list[Tensor]:
    """Layers of different sizes whose scores are all different."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    ranks = draw(st.permutations(range(sum(sizes))))
    return list((torch.tensor(ranks).float() - 3).split(sizes))


def test_hand_worked():
    assert torch.equal(select(SCORES, 3), bits("x.x", "x.."))
    assert torch.equal(select(SCORES, 2), bits("x.x", "..."))
    # one per layer first: 0.9 and 0.4; then the best of the rest: 0.5
    assert torch.equal(select(SCORES, 2, at_least=1), bits("x..", "x.."))
    assert torch.equal(select(SCORES, 3, at_least=1), bits("x.x", "x.."))
    assert torch.equal(select(SCORES, 2, candidates=bits(".xx", "..x")), bits("..x", "..x"))


def test_budget_extremes():
    assert not select(SCORES, 0).any()
    assert select(SCORES, 6).all()
    assert select(SCORES, 100).all()
    candidates = bits("x..", ".x.")
    assert torch.equal(select(SCORES, 100, candidates), candidates)
    assert not select(SCORES, 4, torch.zeros(2, 3, dtype=torch.bool)).any()


def test_ties_go_to_the_lower_layer_then_the_lower_expert():
    equal = torch.zeros(2, 3)
    assert torch.equal(select(equal, 4), bits("xxx", "x.."))
    assert torch.equal(select(equal, 4, at_least=2), bits("xx.", "xx."))
    assert torch.equal(select(equal, 2, bits(".xx", "xxx")), bits(".xx", "..."))


def test_negative_and_infinite_contributions_still_fill_the_budget():
    scores = torch.tensor([[-1.0, -float("inf"), float("inf")], [-2.0, -3.0, -4.0]])
    assert torch.equal(select(scores, 3), bits("x.x", "x.."))
    assert torch.equal(select(scores, 1, bits(".x.", "...")), bits(".x.", "..."))


@given(layers(), st.integers(0, 30), st.integers(0, 3), st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_select_is_the_optimum_under_the_constraints(scores: list[Tensor], budget: int, at_least: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    candidates = [torch.rand(len(s), generator=generator) < 0.7 for s in scores]
    if budget < at_least * len(scores) or any(c.sum() < at_least for c in candidates):
        with pytest.raises(ValueError, match="at least"):
            select(scores, budget, candidates, at_least)
        return
    chosen = select(scores, budget, candidates, at_least)
    flat, allowed = torch.cat(list(chosen)), torch.cat(candidates)
    assert not (flat & ~allowed).any()
    assert flat.sum() == min(budget, int(allowed.sum()))
    for layer_scores, layer_chosen, layer_allowed in zip(scores, chosen, candidates, strict=True):
        assert layer_chosen.sum() >= at_least
        left_out = layer_scores[layer_allowed & ~layer_chosen]
        if layer_chosen.any() and len(left_out):
            assert layer_scores[layer_chosen].min() > left_out.max()  # the best of every layer
    # Swapping a chosen expert for a better one elsewhere would break the minimum of the chosen one's layer.
    left_out = torch.cat(scores)[allowed & ~flat]
    for layer_scores, layer_chosen in zip(scores, chosen, strict=True):
        if layer_chosen.sum() > at_least and len(left_out):
            assert layer_scores[layer_chosen].min() > left_out.max()


@given(layers(), st.integers(0, 12), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_permuting_experts_permutes_the_selection(scores: list[Tensor], budget: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(s), generator=generator) for s in scores]
    permuted = select([s[o] for s, o in zip(scores, orders, strict=True)], budget)
    for left, right, order in zip(permuted, select(scores, budget), orders, strict=True):
        assert torch.equal(left, right[order])


def test_select_errors_name_the_way_out():
    with pytest.raises(ValueError, match="at least 4"):
        select(SCORES, 3, at_least=2)
    with pytest.raises(ValueError, match="layer 1 has 1 candidates"):
        select(SCORES, 6, bits("xxx", "x.."), at_least=2)
    with pytest.raises(ValueError, match="layer 1 contains NaN"):
        select(torch.tensor([[1.0], [float("nan")]]), 1)
    with pytest.raises(ValueError, match="budget=-1"):
        select(SCORES, -1)
    with pytest.raises(ValueError, match="candidates do not"):
        select(SCORES, 1, bits("xx", "xx"))
    for shapeless in (torch.zeros(3), [], [torch.zeros(2, 2)]):
        with pytest.raises(ValueError, match="expected"):
            select(shapeless, 1)


def test_activation_hand_worked():
    contribution = torch.tensor([0.4, 0.9, 0.1, 0.8, 0.5])
    hit, resident = bits("xxx.x")[0], bits("x.xxx")[0]
    # hit and resident: 0, 2 and 4, of which 4 and 0 are the best
    assert torch.equal(activation(contribution, hit, resident, None), bits("x.x.x")[0])
    assert torch.equal(activation(contribution, hit, resident, 2), bits("x...x")[0])
    assert torch.equal(activation(contribution, hit, resident, 99), bits("x.x.x")[0])
    assert not activation(contribution, hit, resident, 0).any()


def test_activation_ties_nan_and_minus_infinity():
    everyone = bits("xxxx")[0]
    assert torch.equal(activation(torch.zeros(4), everyone, everyone, 2), bits("xx..")[0])
    scores = torch.tensor([float("nan"), -5.0, -float("inf"), 1.0])
    assert torch.equal(activation(scores, everyone, everyone, 2), bits(".x.x")[0])
    assert torch.equal(activation(scores, bits("..x.")[0], everyone, 1), bits("..x.")[0])


@given(layers(), st.integers(0, 8))
@settings(max_examples=40, deadline=None)
def test_activation_agrees_with_select_in_one_layer(scores: list[Tensor], budget: int):
    layer = scores[0]
    hit, resident = layer > -2, torch.arange(len(layer)) != 1
    assert torch.equal(activation(layer, hit, resident, budget), select([layer], budget, [hit & resident])[0])


@pytest.mark.parametrize("budget", [None, 0, 3, 99])
def test_activation_never_reads_a_value_back(budget: int | None):
    scores, mask = torch.zeros(8, device="meta"), torch.zeros(8, dtype=torch.bool, device="meta")
    assert activation(scores, mask, mask, budget).shape == (8,)  # a meta tensor has no values: a read would raise


def test_activation_errors():
    with pytest.raises(ValueError, match="expected contribution"):
        activation(torch.zeros(3), bits("xx")[0], bits("xxx")[0], 1)
    with pytest.raises(ValueError, match="budget=-1"):
        activation(torch.zeros(2), bits("xx")[0], bits("xx")[0], -1)
