"""The trained tensors of one layer's experts: one stack per kind, and one leaf per expert for the optimizer.

A leaf is a view of its expert's row. Autograd and the optimizer see single experts: an expert without tokens has no
gradient (not a gradient of zeros), so no optimizer changes it or keeps state for it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hfedmoe.moe.experts.kernel import FULL, LORA


class TrainedExperts:
    """Trained tensors of `E` experts: `stacks[name]` is `[E, ...]`, `leaves[name][e]` its row with gradient."""

    def __init__(self, stacks: dict[str, Tensor], scale: float = 1.0, fixed: Sequence[str] = ()) -> None:
        self.scale = scale
        self.fixed = tuple(fixed)
        self.stacks = stacks
        self.leaves = {name: self._views(name, stack) for name, stack in stacks.items()}

    def _views(self, name: str, stack: Tensor) -> list[Tensor]:
        return [row.detach().requires_grad_(name not in self.fixed) for row in stack.unbind(0)]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the stacks."""
        return tuple(self.stacks)

    @property
    def travelling(self) -> tuple[str, ...]:
        """Names of the trained tensors: these are sent."""
        return tuple(name for name in self.stacks if name not in self.fixed)

    @property
    def num_experts(self) -> int:
        """E, the number of present experts."""
        return next(iter(self.stacks.values())).shape[0]

    def of(self, experts: Sequence[int]) -> list[Tensor]:
        """The leaves of some experts, expert by expert, in the order of `names`."""
        return [self.leaves[name][expert] for expert in experts for name in self.stacks]

    def parameters(self) -> list[Tensor]:
        """All leaves that receive gradients."""
        return [leaf for name in self.travelling for leaf in self.leaves[name]]

    def has_gradient(self) -> list[bool]:
        """Whether each expert received a gradient in the last backward pass."""
        return [
            any(self.leaves[name][expert].grad is not None for name in self.travelling)
            for expert in range(self.num_experts)
        ]

    def select(self, experts: Tensor) -> "TrainedExperts":
        """A copy with only some experts (int64 indices)."""
        stacks = {name: _rows(stack, experts) for name, stack in self.stacks.items()}
        return TrainedExperts(stacks, self.scale, self.fixed)

    def of_rank(self, rank: int) -> "TrainedExperts":
        """LoRA pairs of a lower rank and the same scale, of the same experts; their values are to be loaded."""
        if self.stacks["up_a"].shape[1] == rank:
            return self
        stacks = {name: _narrow(stack, rank, 1 if name.endswith("_a") else 2) for name, stack in self.stacks.items()}
        return TrainedExperts(stacks, self.scale, self.fixed)


def _narrow(stack: Tensor, rank: int, dim: int) -> Tensor:
    """A copy of the first `rank` rows or columns of a stack; B stays stored as its transpose."""
    narrow = stack.detach().narrow(dim, 0, rank)
    return narrow.clone() if dim == 1 else narrow.transpose(1, 2).contiguous().transpose(1, 2)


def _rows(stack: Tensor, experts: Tensor) -> Tensor:
    """Some rows of a stack; B stays stored as its transpose."""
    if stack.is_contiguous():
        return stack.index_select(0, experts)
    return stack.transpose(1, 2).index_select(0, experts).transpose(1, 2)


def fresh_a(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A of new LoRA pairs [..., R, in], drawn as in PEFT (Kaiming, a = sqrt 5): float32, on the CPU."""
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def lora_experts(
    num_experts: int,
    up_shape: tuple[int, int],
    down_shape: tuple[int, int],
    rank: int,
    alpha: float,
    seed: int,
    device: torch.device,
    freeze_a: bool = False,
) -> TrainedExperts:
    """New LoRA pairs: A uniform as in PEFT (Kaiming, a = sqrt 5), B zero, so that the model is unchanged.

    B [out, R] is stored as its transpose: products with a thin matrix are faster by row.

    The same seed gives the same A on every device, bit for bit.

    Args:
        up_shape: [U, H] of the up projection; down_shape: [H, I].
        alpha: the low-rank term is scaled by alpha / rank.
        freeze_a: A stays as it is and only B is trained (FFA-LoRA).
    """
    generator = torch.Generator().manual_seed(seed)
    stacks: dict[str, Tensor] = {}
    for side, (rows, columns) in (("up", up_shape), ("down", down_shape)):
        stacks[f"{side}_a"] = fresh_a((num_experts, rank, columns), generator).to(device)
        stacks[f"{side}_b"] = torch.zeros(num_experts, rank, rows, device=device).transpose(1, 2)
    fixed = ("up_a", "down_a") if freeze_a else ()
    return TrainedExperts({name: stacks[name] for name in LORA}, alpha / rank, fixed)


def full_experts(tensors: dict[str, Tensor]) -> TrainedExperts:
    """Train the base tensors themselves: leaves are views of the stacks `[E, ...]` that the model computes with."""
    return TrainedExperts({name: tensors[name] for name in FULL if name in tensors})
