"""HFedMoE+: a plan of the server, worked by hand."""

import torch
from torch import Tensor

from hfedmoe.config import MethodConfig
from hfedmoe.method.plus import assign
from hfedmoe.method.row import Residents, Wish

PLUS = MethodConfig(name="hfedmoe+")


def wish(budget: int, examples: int, *scores: list[float], top_k: int = 1) -> Wish:
    layers = [torch.tensor(layer) for layer in scores]
    return Wish([len(layer) for layer in layers], [top_k] * len(layers), budget, examples, layers)


def listed(plan: Residents) -> list[list[int]]:
    return [layer.int().tolist() for layer in plan]


def nothing(number: int) -> Tensor:
    return torch.zeros(number)


def test_all_experts_are_held_by_the_clients_that_lose_least() -> None:
    # Both like 0 and 1 best. The first with 0 and 2, the second with 1 and 3 are worth 5 + 2 + 4 + 1 = 12; no other
    # two plans that cover all four experts are worth more than 10.
    wishes = [wish(2, 10, [0.5, 0.3, 0.2, 0.0]), wish(2, 10, [0.4, 0.4, 0.1, 0.1])]
    assert [listed(plan)[0] for plan in assign(wishes, nothing(4), PLUS)] == [[1, 0, 1, 0], [0, 1, 0, 1]]
    # Without cover each takes its own best two.
    free = MethodConfig(name="hfedmoe+", options={"cover": 0.0})
    assert [listed(plan)[0] for plan in assign(wishes, nothing(4), free)] == [[1, 1, 0, 0], [1, 1, 0, 0]]


def test_clients_with_more_rows_keep_their_best() -> None:
    # One expert of two each: the client with more rows holds the one that both want, whoever comes first.
    for few, many in ((0, 1), (1, 0)):
        wishes = [wish(1, 1, [0.9, 0.1])] * 2
        wishes[many] = wish(1, 9, [0.7, 0.3])
        plans = assign(wishes, nothing(2), PLUS)
        assert listed(plans[many]) == [[1, 0]]
        assert listed(plans[few]) == [[0, 1]]


def test_layers_get_even_shares_and_budgets_that_cannot_cover_all_are_filled() -> None:
    # Counts of the second layer are larger, but shares say nothing about layers: two experts of each.
    (plan,) = assign([wish(4, 5, [0.4, 0.3, 0.2, 0.1], [70.0, 20.0, 6.0, 4.0])], nothing(8), PLUS)
    assert listed(plan) == [[1, 1, 0, 0], [1, 1, 0, 0]]
    # An unknown client (all scores 0) still fills its budget, top-k in every layer at least.
    (plan,) = assign([wish(5, 5, [0.0] * 4, [0.0] * 4, top_k=2)], nothing(8), PLUS)
    assert [sum(layer) for layer in listed(plan)] in ([2, 3], [3, 2])
