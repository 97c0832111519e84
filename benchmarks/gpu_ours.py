"""Our expert layer, built without a model around it."""

from typing import Literal

import torch
from torch import Tensor

from benchmarks.gpu_layer import ALPHA, RANK, SMALL, Layer, Shape, expert_of, stacks_of
from hfedmoe.moe.experts.activation import Gate
from hfedmoe.moe.experts.frozen import ExpertBase, SeparateBase, base_of
from hfedmoe.moe.experts.groups import group_pairs
from hfedmoe.moe.experts.kernel import ExpertMath, experts_forward
from hfedmoe.moe.experts.store import ExpertStore, HeldWeights
from hfedmoe.moe.experts.trained import TrainedExperts, lora_experts

Held = Literal["stacked", "same", "8bit", "4bit"]
"""Where the frozen weights are: in stacks, or expert by expert in a store (as on a device of a federation), as in
`model.expert_dtype`."""


class RandomSource:
    """Makes the weights of an expert when they are read."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self._shape, self._device, self._dtype = shape, device, dtype

    def shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of one expert."""
        hidden, intermediate = self._shape.hidden, self._shape.intermediate
        return {"up": (2 * intermediate, hidden), "down": (hidden, intermediate)}

    def read(self, layer: int, expert: int) -> dict[str, Tensor]:
        """The tensors of one expert."""
        return expert_of(self._shape, expert, self._device, self._dtype)


def ours(shape: Shape, device: torch.device, dtype: torch.dtype, held: Held = "stacked", lora: bool = True) -> Layer:
    """Our layer with LoRA, or with frozen experts."""
    base, weight_bytes = _base(shape, device, dtype, held)
    trained = _trained(shape, device) if lora else None
    scale = 1.0 if trained is None else trained.scale
    math = ExpertMath(base, gate=Gate(torch.nn.functional.silu, silu=True), scale=scale)

    def forward(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        groups = group_pairs(index.reshape(-1), shape.num_experts, shape.top_k)
        if trained is None:
            return experts_forward(math, x, weights.reshape(-1), groups, {}, [])
        leaves = trained.of([expert for expert, _, _ in groups.spans])
        return experts_forward(math, x, weights.reshape(-1), groups, trained.stacks, leaves)

    return Layer(forward, weight_bytes, [] if trained is None else trained.parameters())


def _base(shape: Shape, device: torch.device, dtype: torch.dtype, held: Held) -> tuple[ExpertBase, int]:
    """The frozen weights and their bytes."""
    if held == "stacked":
        up, down = stacks_of(shape, device, dtype)
        return base_of(up, down, False), up.nbytes + down.nbytes
    store = ExpertStore(RandomSource(shape, device, dtype), [shape.num_experts], held, dtype, device)
    store.reside([torch.ones(shape.num_experts, dtype=torch.bool)])
    base = SeparateBase(HeldWeights(store, 0, "up", False), HeldWeights(store, 0, "down", False))
    return base, store.nbytes


def _trained(shape: Shape, device: torch.device) -> TrainedExperts:
    hidden, intermediate = shape.hidden, shape.intermediate
    trained = lora_experts(
        shape.num_experts, (2 * intermediate, hidden), (hidden, intermediate), RANK, ALPHA, 0, device
    )
    for name in ("up_b", "down_b"):
        trained.stacks[name].normal_(0.0, SMALL)
    return trained
