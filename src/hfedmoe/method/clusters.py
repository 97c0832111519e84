"""Groups of similar experts, by K-means: for methods in which one merged expert stands in for several."""

import torch
from torch import Tensor

STEPS = 20
"""Of Lloyd's algorithm, at most; it ends as soon as no expert changes its group."""


def k_means(points: Tensor, weights: Tensor, number: int) -> Tensor:
    """The group of every point, 0 to number - 1; no group is empty.

    Nothing is drawn: the first centre is the point of the largest weight, each next one is the point farthest from all
    centres so far. A centre is the weighted mean of its group.

    Args:
        points: [n, d].
        weights: [n], not negative; where a group has none, its points count equally.
        number: groups, 1 to n.

    Returns:
        int64 [n].

    Raises:
        ValueError: fewer points than groups, or no group.
    """
    if not 1 <= number <= len(points):
        raise ValueError(f"{len(points)} points cannot form {number} groups")
    points, weights = points.detach().float().cpu(), weights.detach().float().cpu()
    seeds = [int(weights.argmax())]
    while len(seeds) < number:
        distance = torch.cdist(points, points[seeds]).min(1).values
        distance[seeds] = -1.0  # of equal points, each is taken once
        seeds.append(int(distance.argmax()))
    groups = _nearest(points, points[seeds], seeds)
    for _ in range(STEPS):
        shares = torch.stack([shares_within(weights, groups == group) for group in range(number)])
        new = _nearest(points, shares @ points, seeds)
        if torch.equal(new, groups):
            break
        groups = new
    return groups


def shares_within(weights: Tensor, members: Tensor) -> Tensor:
    """Weights [n] as shares of 1 among the members (bool [n], at least one), 0 for others; equal if all are 0."""
    own = torch.where(members, weights, 0.0)
    own = own if bool(own.sum() > 0) else members.float()
    return own / own.sum()


def _nearest(points: Tensor, centres: Tensor, seeds: list[int]) -> Tensor:
    """The nearest centre of every point; the seed of a group never leaves it, so that none becomes empty."""
    groups = torch.cdist(points, centres).argmin(1)
    groups[seeds] = torch.arange(len(seeds))
    return groups
