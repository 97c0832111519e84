import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hfedmoe.method import selection
from hfedmoe.method.selection import activation, comparable, even_shares

SCORES = torch.tensor([[0.9, 0.1, 0.5], [0.4, 0.3, 0.2]])


def bits(*rows: str) -> Tensor:
    return torch.tensor([[mark == "x" for mark in row] for row in rows])


def select(scores: Tensor | list[Tensor], budget: int, at_least: int | list[int] = 0) -> Tensor | list[Tensor]:
    """As one tensor where the layers are alike."""
    chosen = selection.select(list(scores), budget, at_least)
    return torch.stack(chosen) if isinstance(scores, Tensor) else chosen


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


def test_budget_extremes():
    assert not select(SCORES, 0).any()
    assert select(SCORES, 6).all()
    assert select(SCORES, 100).all()


def test_without_draws_ties_go_to_the_lower_layer_then_the_lower_expert():
    equal = torch.zeros(2, 3)
    assert torch.equal(select(equal, 4), bits("xxx", "x.."))
    assert torch.equal(select(equal, 4, at_least=2), bits("xx.", "xx."))


def test_every_client_draws_an_order_of_its_own_for_experts_that_are_equal():
    """Unobserved experts all have the mean of the observed ones; clients must not all choose the same of them."""
    layers = [torch.tensor([9.0, *[1.0] * 15])] * 4
    drawn = [selection.select(layers, 16, 2, torch.Generator().manual_seed(seed)) for seed in range(40)]
    for chosen in drawn:
        assert all(bool(layer[0]) and int(layer.sum()) >= 2 for layer in chosen)  # what is better comes first
        assert sum(int(layer.sum()) for layer in chosen) == 16
    shares = torch.stack([torch.cat(chosen).float() for chosen in drawn]).mean(0).view(4, 16)[:, 1:]
    assert 0.03 < shares.min() < shares.max() < 0.45  # 12 of 60, at random: 0.2 each
    again = selection.select(layers, 16, 2, torch.Generator().manual_seed(0))
    assert all(torch.equal(one, other) for one, other in zip(again, drawn[0], strict=True))


def test_the_order_of_ties_changes_nothing_where_there_are_none():
    drawn = selection.select(list(SCORES), 3, 1, torch.Generator().manual_seed(5))
    assert torch.equal(torch.stack(drawn), bits("x.x", "x.."))


def test_scores_that_grow_with_the_layer_are_compared_by_their_share_of_it():
    small, large = torch.tensor([3.0, 1.0, 0.0]), torch.tensor([100.0, 120.0, 110.0])
    assert torch.equal(select([small, large], 2)[0], bits("...")[0])  # as they are, the second layer takes everything
    fair = comparable([small, large])
    torch.testing.assert_close(fair[0], torch.tensor([2.25, 0.75, 0.0]))  # over 4/3
    torch.testing.assert_close(fair[1], torch.tensor([100.0, 120.0, 110.0]) / 110)
    chosen = select(fair, 2)
    assert [layer.tolist() for layer in chosen] == [[True, False, False], [False, True, False]]
    signed, zeros = comparable([torch.tensor([-1.0, 3.0]), torch.zeros(2)])  # signs and a silent layer stay
    assert signed.tolist() == [-0.5, 1.5]
    assert zeros.tolist() == [0.0, 0.0]


def test_every_layer_gets_the_same_share_of_its_experts():
    assert even_shares([16, 16, 16, 16], 16, 2) == [4, 4, 4, 4]
    assert even_shares([16, 16, 16, 16], 18, 2) == [4, 4, 4, 4]  # rounded down: the other two are for the best scores
    assert even_shares([8, 32], 10, 2) == [2, 8]
    assert even_shares([4, 28], 5, 2) == [2, 3]  # 0.6 and 4.4: the small layer's minimum is taken from the large one
    assert even_shares([4, 4], 20, 2) == [4, 4]
    with pytest.raises(ValueError, match="budget=3 is too small for 2 experts in each of 2 layers"):
        even_shares([4, 4], 3, 2)


@given(st.lists(st.integers(2, 40), min_size=1, max_size=6), st.integers(0, 200), st.integers(0, 2))
@settings(max_examples=80, deadline=None)
def test_even_shares_keep_to_the_budget_and_leave_less_than_one_expert_per_layer(
    numbers: list[int], budget: int, least: int
):
    budget = max(budget, least * len(numbers))
    shares = even_shares(numbers, budget, least)
    assert all(least <= share <= number for share, number in zip(shares, numbers, strict=True))
    left = min(budget, sum(numbers)) - sum(shares)
    assert 0 <= left < len(numbers) or left == 0


def test_layers_may_have_minimums_of_their_own():
    assert [layer.sum().item() for layer in select(list(SCORES), 3, at_least=[0, 2])] == [1, 2]
    with pytest.raises(ValueError, match="it must be at least 4"):
        select(list(SCORES), 3, at_least=[1, 3])
    with pytest.raises(ValueError, match="layer 1 has 3 experts but must get at least 4"):
        select(list(SCORES), 6, at_least=[1, 4])
    with pytest.raises(ValueError, match="1 numbers for 2 layers"):
        select(list(SCORES), 3, at_least=[1])


def test_negative_and_infinite_contributions_still_fill_the_budget():
    scores = torch.tensor([[-1.0, -float("inf"), float("inf")], [-2.0, -3.0, -4.0]])
    assert torch.equal(select(scores, 3), bits("x.x", "x.."))


@given(layers(), st.integers(0, 30), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_select_is_the_optimum_under_the_constraints(scores: list[Tensor], budget: int, at_least: int):
    if budget < at_least * len(scores) or any(len(layer) < at_least for layer in scores):
        with pytest.raises(ValueError, match="at least"):
            select(scores, budget, at_least)
        return
    chosen = select(scores, budget, at_least)
    flat = torch.cat(list(chosen))
    assert flat.sum() == min(budget, len(flat))
    for layer_scores, layer_chosen in zip(scores, chosen, strict=True):
        assert layer_chosen.sum() >= at_least
        left_out = layer_scores[~layer_chosen]
        if layer_chosen.any() and len(left_out):
            assert layer_scores[layer_chosen].min() > left_out.max()  # the best of every layer
    # Swapping a chosen expert for a better one elsewhere would break the minimum of the chosen one's layer.
    left_out = torch.cat(scores)[~flat]
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
    with pytest.raises(ValueError, match="layer 1 has 1 experts"):
        select([torch.zeros(3), torch.zeros(1)], 4, at_least=2)
    with pytest.raises(ValueError, match="layer 1 contains NaN"):
        select(torch.tensor([[1.0], [float("nan")]]), 1)
    with pytest.raises(ValueError, match="budget=-1"):
        select(SCORES, -1)
    for shapeless in ([torch.tensor(0.0)], [], [torch.zeros(2, 2)]):
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
    order = torch.tensor([3, 0, 2, 1])  # 1 first, then 3, 2 and 0
    assert torch.equal(activation(torch.zeros(4), everyone, everyone, 2, order), bits(".x.x")[0])
    assert torch.equal(activation(torch.tensor([1.0, 0, 0, 0]), everyone, everyone, 2, order), bits("xx..")[0])
    scores = torch.tensor([float("nan"), -5.0, -float("inf"), 1.0])
    assert torch.equal(activation(scores, everyone, everyone, 2), bits(".x.x")[0])
    assert torch.equal(activation(scores, bits("..x.")[0], everyone, 1), bits("..x.")[0])


@given(layers(), st.integers(0, 8))
@settings(max_examples=40, deadline=None)
def test_activation_agrees_with_select_in_one_layer(scores: list[Tensor], budget: int):
    layer = scores[0]
    hit, resident = layer > -2, torch.arange(len(layer)) != 1
    chosen = torch.zeros_like(hit)
    chosen[hit & resident] = select([layer[hit & resident]], budget)[0] if (hit & resident).any() else True
    assert torch.equal(activation(layer, hit, resident, budget), chosen)


@pytest.mark.parametrize("budget", [None, 0, 3, 99])
def test_activation_never_reads_a_value_back(budget: int | None):
    scores, mask = torch.zeros(8, device="meta"), torch.zeros(8, dtype=torch.bool, device="meta")
    assert activation(scores, mask, mask, budget).shape == (8,)  # a meta tensor has no values: a read would raise


def test_activation_errors():
    with pytest.raises(ValueError, match="expected contribution"):
        activation(torch.zeros(3), bits("xx")[0], bits("xxx")[0], 1)
    with pytest.raises(ValueError, match="budget=-1"):
        activation(torch.zeros(2), bits("xx")[0], bits("xx")[0], -1)
