"""Where a client begins with experts of its own."""

import torch
from torch import Tensor


def begin_own(tensors: dict[str, Tensor], scores: list[Tensor]) -> None:
    """Choose, in place, the expert that each graft copies, if it has none yet: the layer's best by the client's score.

    Args:
        tensors: what a client begins a round with, among it `own.{layer}.expert` [1], which is below 0 at first.
        scores: [E] per layer; the first expert of equal scores is taken.
    """
    for layer, score in enumerate(scores):
        expert = tensors[f"own.{layer}.expert"]
        if float(expert) < 0:
            tensors[f"own.{layer}.expert"] = torch.full_like(expert, float(score.argmax()))
