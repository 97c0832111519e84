"""Frozen experts that stand in for those which a device does not hold: weighted means of their weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfedmoe.moe.experts.store import ExpertSource, ExpertStore

Read = Callable[[int], dict[str, Tensor]]
"""The tensors of one expert of a layer as they are now, under the names of kernel.FULL."""


@dataclass(frozen=True)
class Mixture:
    """One merged expert: the experts for which it stands in, and the share of each in it."""

    experts: list[int]
    shares: list[float]


@dataclass(frozen=True)
class Merged:
    """The merged experts of one layer."""

    store: ExpertStore
    """Holds them as layer 0."""
    place: Tensor
    """int64 [E + 1]: the merged expert for each expert; the number of merged ones for those that need none."""

    @property
    def number(self) -> int:
        """How many there are."""
        return self.store.num_experts[0]


class MixedSource:
    """Reads mixtures as experts of layer 0, one member after the other: two experts are in memory at a time."""

    def __init__(self, read: Read, shapes: dict[str, tuple[int, ...]], mixtures: Sequence[Mixture]) -> None:
        self._read, self._shapes, self._mixtures = read, shapes, mixtures

    def shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of one expert."""
        return self._shapes

    def read(self, layer: int, expert: int) -> dict[str, Tensor]:
        """The weighted mean of one mixture's experts, in float32."""
        mean: dict[str, Tensor] = {}
        mixture = self._mixtures[expert]
        for member, share in zip(mixture.experts, mixture.shares, strict=True):
            for name, tensor in self._read(member).items():
                if name in mean:
                    mean[name].add_(tensor, alpha=share)
                else:
                    mean[name] = tensor.float() * share
        return mean


def merged_of(
    mixtures: Sequence[Mixture], num_experts: int, read: Read, shapes: dict[str, tuple[int, ...]], like: ExpertStore
) -> Merged:
    """Make the merged experts of a layer, held as the experts of `like` are.

    Args:
        num_experts: E, of the layer.
        read, shapes: of its experts.
    """
    source: ExpertSource = MixedSource(read, shapes, mixtures)
    store = ExpertStore(source, [len(mixtures)], like.expert_dtype, like.dtype, like.device)
    store.reside([torch.ones(len(mixtures), dtype=torch.bool)])
    place = torch.full((num_experts + 1,), len(mixtures), dtype=torch.int64)
    for number, mixture in enumerate(mixtures):
        place[mixture.experts] = number
    return Merged(store, place.to(like.device))
