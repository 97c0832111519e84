"""One layer of experts and its batch: the same weights, routing and inputs for every implementation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

RANK = 16
ALPHA = 16
DEVIATION = 0.02
"""Standard deviation of the frozen weights."""
SMALL = 1e-3
"""Standard deviation of B: not zero, so that nobody skips the low-rank term, but too small to change the output."""


@dataclass(frozen=True)
class Shape:
    """A layer of gated experts. `H` hidden, `I` intermediate, `E` experts, `K` experts per token, `S` = T * K pairs."""

    name: str
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int

    def base_flops(self, tokens: int) -> float:
        """Floating point operations of the products with frozen weights: forward, and gradients of their inputs."""
        return 12.0 * tokens * self.top_k * self.hidden * self.intermediate

    def lora_flops(self, tokens: int) -> float:
        """Those of the products with A and B: forward, gradients of their inputs, and gradients of A and B."""
        return 6.0 * tokens * self.top_k * RANK * (2 * self.hidden + 3 * self.intermediate)


OLMOE = Shape("olmoe", 2048, 1024, 64, 8)
QWEN3 = Shape("qwen3", 2048, 768, 128, 8)
TINY = Shape("tiny", 64, 64, 8, 2)
"""For a dry run; 64 is the block size of quantised weights."""
SHAPES = {shape.name: shape for shape in (OLMOE, QWEN3, TINY)}


@dataclass
class Batch:
    """What goes through a layer, and the gradient that comes back."""

    x: Tensor
    """[T, H], receives a gradient."""
    index: Tensor
    """int64 [T, K]: the experts of each token."""
    weights: Tensor
    """[T, K], receives a gradient."""
    grad: Tensor
    """[T, H]: gradient of the output."""


@dataclass
class Layer:
    """One implementation of the layer."""

    forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    """x [T, H], index and weights [T, K] -> [T, H]."""
    weight_bytes: int
    """Bytes of the frozen weights, as they are held."""
    trained: Sequence[Tensor] = field(default_factory=list)
    paths: Callable[[], dict[str, object]] = dict
    """Which of its own code paths were taken so far, for implementations that choose."""

    def step(self, batch: Batch) -> Tensor:
        """Forward and backward once; returns the output."""
        out = self.forward(batch.x, batch.index, batch.weights)
        out.backward(batch.grad)
        return out

    def clear(self, batch: Batch) -> None:
        """Drop all gradients."""
        for tensor in (batch.x, batch.weights, *self.trained):
            tensor.grad = None


def batch_of(shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Batch:
    """A random batch; the same seed gives the same routing on every machine."""
    index, weights = routing_of(shape, tokens, device, dtype, seed)
    generator = torch.Generator(device).manual_seed(seed)
    x, grad = (
        torch.empty(tokens, shape.hidden, device=device, dtype=dtype).normal_(generator=generator) for _ in range(2)
    )
    return Batch(x.requires_grad_(), index, weights, grad)


def routing_of(shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Index int64 [T, K] and weights [T, K] of a random routing: a softmax over random logits, the K largest."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randn(tokens, shape.num_experts, generator=generator).softmax(-1).topk(shape.top_k, dim=-1)
    return chosen.indices.to(device), chosen.values.to(device, dtype).requires_grad_()


def expert_of(shape: Shape, expert: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Frozen weights of one expert: "up" [2I, H] and "down" [H, I]."""
    generator = torch.Generator(device).manual_seed(expert)
    sizes = {"up": (2 * shape.intermediate, shape.hidden), "down": (shape.hidden, shape.intermediate)}
    return {
        name: torch.empty(size, device=device, dtype=dtype).normal_(0.0, DEVIATION, generator=generator)
        for name, size in sizes.items()
    }


def stacks_of(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Frozen weights of all experts: up [E, 2I, H] and down [E, H, I]."""
    up = torch.empty(shape.num_experts, 2 * shape.intermediate, shape.hidden, device=device, dtype=dtype)
    down = torch.empty(shape.num_experts, shape.hidden, shape.intermediate, device=device, dtype=dtype)
    for expert in range(shape.num_experts):
        own = expert_of(shape, expert, device, dtype)
        up[expert], down[expert] = own["up"], own["down"]
    return up, down
