"""The limit: the matrix products of a layer's step and nothing else, as grouped calls on tensors that already exist."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from benchmarks.gpu_layer import RANK, Batch, Shape, stacks_of


def products(shape: Shape, device: torch.device, dtype: torch.dtype, batch: Batch) -> dict[str, Callable[[], None]]:
    """ "base": products with frozen weights, forward and for the gradients of their inputs; "thin": those with A and B
    for the same; "outer": the gradients of A and B. All experts get the rows that the batch gives them.
    """
    up, down = stacks_of(shape, device, dtype)
    counts = torch.bincount(batch.index.reshape(-1), minlength=shape.num_experts)
    ends = counts.cumsum(0).to(torch.int32)
    size = batch.index.numel()

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=device, dtype=dtype)

    rows, wide = random(size, shape.hidden), random(size, 2 * shape.intermediate)
    narrow, low = random(size, shape.intermediate), random(size, RANK)
    sides = [(rows, wide), (narrow, rows)]
    pairs = [
        (random(shape.num_experts, RANK, left.shape[1]), random(shape.num_experts, RANK, right.shape[1]))
        for left, right in sides
    ]

    def base() -> None:
        grouped_mm(rows, up.transpose(1, 2), offs=ends)
        grouped_mm(narrow, down.transpose(1, 2), offs=ends)
        grouped_mm(rows, down, offs=ends)
        grouped_mm(wide, up, offs=ends)

    def thin() -> None:
        for (left, right), (a, b) in zip(sides, pairs, strict=True):
            grouped_mm(left, a.transpose(1, 2), offs=ends)
            grouped_mm(low, b, offs=ends)
            grouped_mm(right, b.transpose(1, 2), offs=ends)
            grouped_mm(low, a, offs=ends)

    def outer() -> None:
        for left, right in sides:
            grouped_mm(low.t(), left, offs=ends)
            grouped_mm(low.t(), right, offs=ends)

    return {"base": base, "thin": thin, "outer": outer}
