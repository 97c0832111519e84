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


@dataclass(frozen=True)
class Originals:
    """The experts of a layer without what was trained: how to read one, and how they are held."""

    read: Read
    shapes: dict[str, tuple[int, ...]]
    expert_dtype: str
    """As of `ExpertStore`; `dtype` and `device` likewise."""
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of_store(cls, store: ExpertStore, layer: int) -> "Originals":
        """Those of a layer that a store reads."""
        source = store.source
        return cls(
            lambda expert: source.read(layer, expert),
            source.shapes(layer),
            store.expert_dtype,
            store.dtype,
            store.device,
        )

    @classmethod
    def of_stacks(cls, stacks: dict[str, Tensor]) -> "Originals":
        """Those in memory as stacks [E, ...]."""
        shapes = {name: tuple(stack.shape[1:]) for name, stack in stacks.items()}
        down = stacks["down"]
        return cls(
            lambda expert: {name: stack[expert] for name, stack in stacks.items()},
            shapes,
            "same",
            down.dtype,
            down.device,
        )


def merged_of(mixtures: Sequence[Mixture], num_experts: int, originals: Originals, read: Read | None = None) -> Merged:
    """Make the merged experts of a layer, held as its experts are.

    Args:
        num_experts: E, of the layer.
        read: reads the experts as they are now; None: the originals.
    """
    source: ExpertSource = MixedSource(read or originals.read, originals.shapes, mixtures)
    store = ExpertStore(source, [len(mixtures)], originals.expert_dtype, originals.dtype, originals.device)
    store.reside([torch.ones(len(mixtures), dtype=torch.bool)])
    place = torch.full((num_experts + 1,), len(mixtures), dtype=torch.int64)
    for number, mixture in enumerate(mixtures):
        place[mixture.experts] = number
    return Merged(store, place.to(originals.device))
