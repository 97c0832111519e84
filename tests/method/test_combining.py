"""Experts made of all their copies at once."""

import torch
from torch import Tensor

from hfedmoe.method.averaging import StacksAverage
from hfedmoe.method.combining import StacksCombined

STRETCHES = {"a": (0, 2), "b": (0, 2), "c": (2, 3)}


def previous() -> dict[str, Tensor]:
    return {"a": torch.zeros(2, 3), "b": torch.ones(2, 1, 2), "c": torch.arange(6.0).view(3, 2)}


def updates(seed: int) -> list[tuple[dict[str, Tensor], Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(seed)
    found = []
    for index in ([0, 2, 3], [1, 2, 4], [0, 1, 2, 3, 4]):
        experts = torch.tensor(index)
        first = int((experts < 2).sum())
        stacks = {
            "a": torch.rand(first, 3, generator=draws),
            "b": torch.rand(first, 1, 2, generator=draws),
            "c": torch.rand(len(index) - first, 2, generator=draws),
        }
        found.append((stacks, experts, torch.rand(len(index), generator=draws)))
    return found


def test_the_weighted_mean_as_a_rule_is_the_average() -> None:
    combined = StacksCombined(STRETCHES, lambda changes, weights: weights @ changes / weights.sum())
    average = StacksAverage(STRETCHES)
    for stacks, index, weight in updates(1):
        combined.add(stacks, index, weight)
        average.add(stacks, index, weight)
    expected = average.result(previous())
    for name, tensor in combined.result(previous()).items():
        torch.testing.assert_close(tensor, expected[name])


def test_a_rule_sees_the_changes_of_one_expert_and_nobody_s_expert_stays() -> None:
    seen: list[tuple[list[list[float]], list[float]]] = []

    def rule(changes: Tensor, weights: Tensor) -> Tensor:
        seen.append((changes.tolist(), weights.tolist()))
        return changes.max(0).values

    combined = StacksCombined(STRETCHES, rule)
    stacks = {"a": torch.full((1, 3), 2.0), "b": torch.full((1, 1, 2), 5.0), "c": torch.zeros(1, 2)}
    combined.add(stacks, torch.tensor([1, 3]), torch.tensor([0.5, 0.0]))
    new = combined.result(previous())
    assert seen == [([[2.0, 2.0, 2.0, 4.0, 4.0]], [0.5])]
    assert new["a"].tolist() == [[0.0] * 3, [2.0] * 3]
    assert new["b"].flatten().tolist() == [1.0, 1.0, 5.0, 5.0]
    assert torch.equal(new["c"], previous()["c"])  # weight 0
