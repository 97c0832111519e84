"""Which experts a client merges into one, where merged experts stand in for those that it does not hold."""

import torch
from torch import Tensor

from hfedmoe.method.clusters import k_means, shares_within
from hfedmoe.moe.experts.merged import Mixture
from hfedmoe.moe.model import MoEModel


def mixtures(
    model: MoEModel, resident: list[Tensor], room: list[int], usage: list[Tensor] | None
) -> list[list[Mixture]]:
    """Groups of absent experts with similar rows of the router, weighted by usage, layer by layer.

    Args:
        resident: bool [E] per layer.
        room: merged experts per layer, at most; 0: no token of the layer goes to absent experts.
        usage: the client's, [E] per layer; None: experts count equally.
    """
    found: list[list[Mixture]] = []
    for layer, keep, number in zip(model.layers, resident, room, strict=True):
        absent = (~keep).nonzero()[:, 0]
        number = min(number, len(absent))
        if number == 0:
            found.append([])
            continue
        weights = torch.ones(len(absent)) if usage is None else usage[layer.index][absent]
        groups = k_means(layer.directions[absent.to(layer.directions.device)], weights, number)
        found.append([_mixture(absent, weights, groups == group) for group in range(number)])
    return found


def _mixture(absent: Tensor, weights: Tensor, members: Tensor) -> Mixture:
    shares = shares_within(weights.float().cpu(), members)[members]
    return Mixture(absent[members].tolist(), shares.tolist())
