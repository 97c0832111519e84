"""Which components of the experts' LoRA pairs arrived in a round in which clients have different ranks."""

import torch
from torch import Tensor

from hfedmoe.moe.payload import layer_of
from hfedmoe.moe.ranks import expert_pairs


class Arrived:
    """The largest rank in which each expert arrived.

    Decision: components beyond it keep their global values. Zeros alone would make both factors 0, and a component
    whose factors are both 0 can never be trained again.
    """

    def __init__(self) -> None:
        self._ranks: dict[int, Tensor] = {}

    def add(self, tensors: dict[str, Tensor], sent: list[Tensor], weights: list[Tensor]) -> None:
        """Note one client's update.

        Args:
            tensors: as received, of the client's own rank.
            sent: bool [E] per layer; weights: float32 [E] per layer, what its copies count.
        """
        for a, _ in expert_pairs(tensors):
            layer = layer_of(a)
            counts = sent[layer] & (weights[layer] > 0)
            ranks = self._ranks.setdefault(layer, torch.zeros(len(counts), dtype=torch.int64))
            ranks[counts] = ranks[counts].clamp_min(tensors[a].shape[1])

    def merge(self, other: "Arrived") -> None:
        """Note the updates of another one."""
        for layer, ranks in other._ranks.items():
            own = self._ranks.get(layer)
            self._ranks[layer] = ranks.clone() if own is None else torch.maximum(own, ranks)

    def keep_the_others(self, new: dict[str, Tensor], before: dict[str, Tensor]) -> None:
        """Put the components of `before` that did not arrive into `new`, in place; all are [E, ...]."""
        for a, b in expert_pairs(new):
            ranks = self._ranks.get(layer_of(a))
            if ranks is None:
                continue
            missing = (torch.arange(new[a].shape[1]) >= ranks[:, None]).to(new[a].device)  # [E, R]
            new[a] = torch.where(missing[:, :, None], before[a], new[a])
            new[b] = torch.where(missing[:, None, :], before[b], new[b])
