"""What each rival does that no other does, on cases worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from hfedmoe.config import MethodConfig
from hfedmoe.method.copies import Copies
from hfedmoe.method.methods import METHODS
from hfedmoe.method.rivals.conflicts import among_similar, give_back, to_the_federation, without_conflicts
from hfedmoe.method.rivals.fedavg import proximal
from hfedmoe.method.rivals.fedmoe import hold_to_threshold
from hfedmoe.method.rivals.flame import experts_per_token
from hfedmoe.method.rivals.flex_moe import assign
from hfedmoe.method.row import EVERYTHING, Outlook, Wish

PLAIN = MethodConfig()


def outlook(budget: int, scores: list[list[float]], top_k: int = 1) -> Outlook:
    numbers = [len(layer) for layer in scores]
    contribution = [torch.tensor(layer) for layer in scores]
    return Outlook(numbers, [top_k] * len(numbers), budget, lambda: contribution, torch.Generator().manual_seed(0))


def copies(**changes: Tensor) -> Copies:
    flags = torch.tensor([True, True, False])
    vectors = {
        "usage": torch.tensor([0.5, 0.25, 0.25]),
        "importance": torch.tensor([0.4, 0.2, 0.2]),
        "tokens": torch.tensor([6.0, 2.0, 0.0]),
        "held": flags,
        "trained": torch.tensor([True, False, False]),
    }
    return Copies(10, **(vectors | changes))


def listed(layers: list[Tensor]) -> list[list[int]]:
    return [layer.int().tolist() for layer in layers]


def test_fedprox_pulls_towards_the_start() -> None:
    settings = MethodConfig(name="fedprox", options={"mu": 0.5})
    now = [torch.tensor([1.0, 2.0], requires_grad=True)]
    term = proximal(now, [torch.tensor([0.0, 0.0])], settings)
    assert term.item() == pytest.approx(0.5 / 2 * 5)
    term.backward()
    assert now[0].grad is not None
    assert now[0].grad.tolist() == [0.5, 1.0]  # mu (w - w0)


def test_random_and_frequent_experts_count_for_those_that_held_them() -> None:
    for name in ("random", "frequency", "fedmoe"):
        assert METHODS[name].expert_weight(copies(), PLAIN).tolist() == [10.0, 10.0, 0.0]
    frequent = METHODS["frequency"].hold(outlook(3, [[0.1, 0.7, 0.2], [0.3, 0.3, 0.4]]), PLAIN)
    assert listed(frequent)[0] == [0, 1, 0]
    drawn = METHODS["random"].hold(outlook(3, [[0.1, 0.7, 0.2], [0.3, 0.3, 0.4]]), PLAIN)
    assert sum(map(sum, listed(drawn))) == 3


def test_fedmoe_holds_fewer_experts_where_few_take_most_tokens() -> None:
    skewed, even = [0.9, 0.05, 0.03, 0.02], [0.25, 0.25, 0.25, 0.25]
    # theta = 0.75 needs 1 + 3; the next larger one that changes anything needs a fourth in the second layer.
    held = listed(hold_to_threshold(outlook(4, [skewed, even]), PLAIN))
    assert [sum(layer) for layer in held] == [1, 3]
    assert held[0] == [1, 0, 0, 0]
    assert [sum(layer) for layer in listed(hold_to_threshold(outlook(4, [skewed, even], top_k=2), PLAIN))] == [2, 2]
    assert [sum(layer) for layer in listed(hold_to_threshold(outlook(8, [skewed, even]), PLAIN))] == [4, 4]


def test_flame_weighs_by_frequency_and_gives_weak_clients_fewer_experts_per_token() -> None:
    settings = MethodConfig(name="flame", options={"power": 2.0})
    assert METHODS["flame"].expert_weight(copies(), settings).tolist() == pytest.approx([0.75**2 * 10, 0.25**2 * 10, 0])
    assert [experts_per_token(share, 8) for share in (1.0, 0.5, 0.25, 0.1, 0.01)] == [8, 4, 2, 1, 1]
    assert METHODS["flame"].private == {"scale"}


def test_flex_moe_gives_every_expert_to_somebody() -> None:
    # Both clients like expert 0 best. With budgets of 2 and 4 experts, each must be held by at least one.
    def wish(scores: list[float]) -> Wish:
        return Wish([4], [1], 2, 5, [torch.tensor(scores)])

    settings = MethodConfig(name="flex_moe", options={"least_load": 1.0, "most_load": 1.0, "credit": 0.0})
    plans = assign([wish([1.0, 0.6, 0.1, 0.0]), wish([1.0, 0.2, 0.5, 0.3])], torch.zeros(4), settings)
    assert [listed(plan)[0] for plan in plans] == [[1, 1, 0, 0], [0, 0, 1, 1]]
    # Without bounds both take what fits them best.
    free = MethodConfig(name="flex_moe", options={"least_load": 0.0, "most_load": 4.0, "credit": 0.0})
    plans = assign([wish([1.0, 0.6, 0.1, 0.0]), wish([1.0, 0.2, 0.5, 0.3])], torch.zeros(4), free)
    assert [listed(plan)[0] for plan in plans] == [[1, 1, 0, 0], [1, 0, 1, 0]]
    # Credit: expert 3 was never held, the others often.
    credit = MethodConfig(name="flex_moe", options={"least_load": 0.0, "most_load": 4.0, "credit": 5.0})
    plans = assign([wish([1.0, 0.6, 0.1, 0.0])], torch.tensor([4.0, 4.0, 4.0, 0.0]), credit)
    assert listed(plans[0])[0] == [1, 0, 0, 1]


def test_flex_moe_keeps_top_k_in_every_layer_even_beyond_its_bounds() -> None:
    wishes = [Wish([2, 2], [2, 2], 4, 1, [torch.rand(2), torch.rand(2)]) for _ in range(3)]
    plans = assign(wishes, torch.zeros(4), MethodConfig(name="flex_moe", options={"most_load": 1.0}))
    assert all(listed(plan) == [[1, 1], [1, 1]] for plan in plans)
    assert METHODS["flex_moe"].private == {"router"}
    assert METHODS["flex_moe"].expert_weight(copies(), PLAIN).tolist() == [5.0, 2.5, 0.0]


def test_fc_moe_removes_what_opposes_the_common_direction_and_gives_half_of_it_back() -> None:
    changes = torch.tensor([[3.0, 0.0], [-1.0, 1.0]])
    weights = torch.tensor([0.5, 0.5])
    # Weights are frequency x norm: 1.5 and 0.707, so 0.6796 and 0.3204 of their sum.
    share = 3.0 / (3.0 + math.sqrt(2))
    direction = share * changes[0] + (1 - share) * changes[1]
    along = float(changes[1] @ direction / direction.square().sum())
    assert along < 0 < float(changes[0] @ direction)
    expected = share * changes[0] + (1 - share) * (changes[1] - along * direction)
    torch.testing.assert_close(without_conflicts(changes, weights, PLAIN), expected)
    assert without_conflicts(changes, torch.zeros(2), PLAIN).tolist() == [0.0, 0.0]
    # The client had gone to -2 while the federation went to +1: all of its update was removed, half comes back.
    settings = MethodConfig(name="fc_moe", options={"back": 0.5})
    back = give_back(torch.tensor([1.0, 0.0]), torch.zeros(2), torch.tensor([-2.0, 3.0]), settings)
    assert back.tolist() == [0.0, 0.0]
    assert give_back(torch.ones(2), torch.zeros(2), torch.ones(2), settings).tolist() == [1.0, 1.0]


def test_fedalign_leaves_out_the_update_that_is_unlike_the_others() -> None:
    changes = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.2]])
    settings = MethodConfig(name="fedalign_moe", options={"spread": 1.0})
    out = among_similar(changes, torch.tensor([1.0, 3.0, 1.0]), settings)
    torch.testing.assert_close(out, torch.tensor([1.0, 0.075]))
    alike = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert among_similar(alike, torch.ones(2), settings).tolist() == [1.0, 0.0]


def test_fedalign_penalises_routing_unlike_the_federation_and_weighs_gates_by_agreement() -> None:
    settings = MethodConfig(name="fedalign_moe", options={"penalty": 1.0})
    own, usual = torch.tensor([0.5, 0.5], requires_grad=True), torch.tensor([0.25, 0.75])
    term = to_the_federation([own], [usual], settings)
    assert term.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    term.backward()
    assert own.grad is not None
    assert own.grad[0] > own.grad[1]  # less of the first expert, more of the second
    row = METHODS["fedalign_moe"]
    assert float(row.gate_weight(copies(), settings)) == 10.0
    usual = torch.tensor([0.0, 0.5, 0.5])
    cosine = 0.25 / math.sqrt(0.375 * 0.5)
    assert float(row.gate_weight(copies(federation=usual), settings)) == pytest.approx(10 * cosine)


def test_bounds() -> None:
    assert METHODS["local"].private == EVERYTHING
    assert METHODS["unlimited"].unlimited
    assert METHODS["pooled"].unlimited
    assert METHODS["pooled"].pooled
    assert all(bool(layer.all()) for layer in METHODS["unlimited"].hold(outlook(1, [[1.0, 2.0]]), PLAIN))
