"""The first components of LoRA pairs: what travels to and from a client whose rank is smaller than the federation's.

Component i of a pair is row i of A [n, R, in] and column i of B [n, out, R]: B A is the sum of their outer products.
Where both are 0, both gradients are exactly 0, and AdamW leaves them 0 (also with weight decay). So a client that pads
its first r components with zeros trains rank r, and no other code has to know.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hfedmoe.moe.payload import MismatchError, lora_pairs


def expert_pairs(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """The names (A, B) of the experts' LoRA pairs among sent tensors."""
    return [pair for pair in lora_pairs(tensors) if pair[0].startswith("experts.")]


def cut(tensors: Mapping[str, Tensor], rank: int | None) -> dict[str, Tensor]:
    """The tensors with only the first `rank` components of the experts' LoRA pairs, as views; None: all of them."""
    shorter = dict(tensors)
    if rank is not None:
        for a, b in expert_pairs(tensors):
            shorter[a], shorter[b] = tensors[a][:, :rank], tensors[b][..., :rank]
    return shorter


def padded(tensors: Mapping[str, Tensor], rank: int | None, full: int) -> dict[str, Tensor]:
    """The inverse of `cut`: with zeros from `rank` up to `full` components; None: nothing is missing.

    Raises:
        MismatchError: a pair does not have exactly `rank` components.
    """
    longer = dict(tensors)
    if rank is None:
        return longer
    pad = torch.nn.functional.pad
    for a, b in expert_pairs(tensors):
        for name, axis in ((a, 1), (b, 2)):
            if tensors[name].dim() != 3 or tensors[name].shape[axis] != rank:
                raise MismatchError(f"{name}: shape {tuple(tensors[name].shape)} is not of rank {rank}")
        longer[a] = pad(tensors[a], (0, 0, 0, full - rank))
        longer[b] = pad(tensors[b], (0, full - rank))
    return longer
