"""K-means on cases worked out by hand."""

import pytest
import torch

from hfedmoe.method.clusters import k_means, shares_within

LINE = torch.tensor([[0.0], [1.0], [10.0], [11.0]])


def groups_of(points: torch.Tensor, weights: list[float], number: int) -> set[frozenset[int]]:
    found = k_means(points, torch.tensor(weights), number)
    assert sorted(set(found.tolist())) == list(range(number))  # no group is empty
    return {frozenset((found == group).nonzero()[:, 0].tolist()) for group in range(number)}


def test_neighbours_form_groups() -> None:
    assert groups_of(LINE, [1.0, 1.0, 1.0, 1.0], 2) == {frozenset({0, 1}), frozenset({2, 3})}
    assert groups_of(LINE, [0.0, 1.0, 0.0, 0.0], 1) == {frozenset({0, 1, 2, 3})}
    assert groups_of(LINE, [1.0, 2.0, 3.0, 4.0], 4) == {frozenset({number}) for number in range(4)}


def test_weights_move_the_centres() -> None:
    """Seeds are 0 and 12, so the groups begin as {0, 4.5} and {8, 12}; nearly all weight of the first is on 0.

    With equal weights the second centre is 10, and 4.5 is nearer to 0. With the weight on 8, the centre moves to about
    8, and 4.5 goes over to it.
    """
    points = torch.tensor([[0.0], [4.5], [8.0], [12.0]])
    assert groups_of(points, [9.0, 0.0, 1.0, 1.0], 2) == {frozenset({0, 1}), frozenset({2, 3})}
    assert groups_of(points, [9.0, 0.0, 8.0, 0.1], 2) == {frozenset({0}), frozenset({1, 2, 3})}


def test_equal_points_fill_all_groups() -> None:
    assert groups_of(torch.ones(3, 2), [1.0, 1.0, 1.0], 2) in (
        {frozenset({0, 2}), frozenset({1})},
        {frozenset({0}), frozenset({1, 2})},
    )


def test_shares() -> None:
    members = torch.tensor([True, False, True])
    assert shares_within(torch.tensor([3.0, 5.0, 1.0]), members).tolist() == [0.75, 0.0, 0.25]
    assert shares_within(torch.tensor([0.0, 5.0, 0.0]), members).tolist() == [0.5, 0.0, 0.5]


@pytest.mark.parametrize("number", [0, 5])
def test_more_groups_than_points(number: int) -> None:
    with pytest.raises(ValueError, match=f"4 points cannot form {number} groups"):
        k_means(LINE, torch.ones(4), number)
