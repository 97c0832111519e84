"""Frozen weights in 16 bit, arithmetic in float32: for CPUs that multiply 16-bit matrices slowly or not at all.

Matrices stay in 16 bit and are cast to float32 in each use, one block of rows at a time. So a model takes the memory
of 16 bit and the time of float32. Small tensors (norms, routers, biases) become float32, so trained ones have full
precision.
"""

import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hfedmoe.moe.anatomy import find_moe_layers

CPUINFO = Path("/proc/cpuinfo")
BLOCK_ELEMENTS = 1 << 22
"""Weights cast at once: 16 MB in float32. The output head is far larger than any other matrix."""


def multiplies_16_bit(device: torch.device, dtype: torch.dtype, here: bool = False) -> bool:
    """Whether the device has instructions for matrix products in `dtype`; CPUs list them in /proc/cpuinfo.

    CUDA has them for bfloat16 from compute capability 8; a GPU that is not `here` is assumed to have them.

    Args:
        here: the device is in this machine.
    """
    if here and device.type == "cuda" and dtype == torch.bfloat16:
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu" or dtype == torch.float32:
        return True
    if not CPUINFO.exists():
        return False
    lines = [line for line in CPUINFO.read_text().splitlines() if line.startswith(("flags", "Features"))]
    flags = set(lines[0].split()) if lines else set()
    if platform.machine() in ("aarch64", "arm64"):
        return dtype == torch.bfloat16 and "bf16" in flags
    wanted = {"avx512_bf16", "amx_bf16"} if dtype == torch.bfloat16 else {"avx512_fp16", "amx_fp16"}
    return bool(wanted & flags)


def wants_float32(compute: str, device: torch.device, dtype: torch.dtype, here: bool = False) -> bool:
    """Whether `model.compute` ("auto", "float32" or "same") means float32 for weights of this precision on this device.

    "auto" never computes in float16: there, gradients of a LoRA factor vanish while the other factor is still small.
    """
    slow = dtype == torch.float16 or not multiplies_16_bit(device, dtype, here)
    return compute == "float32" or (compute == "auto" and slow)


def compute_in_float32(model: Any) -> None:
    """Change a 16-bit model in place so that it computes in float32; the expert kernel casts the experts.

    Raises:
        UnsupportedModelError: the model has no MoE layers.
    """
    experts = {id(p) for layer in find_moe_layers(model) for p in layer.experts.parameters()}
    routers = {id(p) for layer in find_moe_layers(model) for p in layer.router.parameters()}
    compact: set[int] = set()
    for module in model.modules():
        plain = type(module) in (nn.Linear, nn.Embedding)
        if plain and id(module.weight) not in experts | routers and module.weight.dtype.itemsize == 2:
            # The same object with another forward: references to it, tied weights and hooks stay valid.
            module.__class__ = CompactLinear if isinstance(module, nn.Linear) else _CompactEmbedding
            compact.add(id(module.weight))
    for parameter in model.parameters():
        if id(parameter) not in experts | compact and parameter.dtype.itemsize == 2:
            parameter.data = parameter.data.float()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and buffer.dtype.itemsize == 2:
                module._buffers[name] = buffer.float()
    model.config.dtype = torch.float32  # the dtype of masks and caches


class CompactLinear(nn.Linear):
    """A linear layer with frozen 16-bit weights that computes in float32."""

    def forward(self, x: Tensor) -> Tensor:
        out = _CastProduct.apply(x.float(), self.weight)
        return out if self.bias is None else out + self.bias


class _CompactEmbedding(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).float()


class _CastProduct(torch.autograd.Function):
    """x [..., in] @ weight' for a frozen 16-bit weight [out, in]; keeps no float32 copy of it for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        rows = x.reshape(-1, x.shape[-1])
        out = rows.new_empty(rows.shape[0], weight.shape[0])
        blocks = _blocks(weight)
        for block, columns in zip(blocks, out.split([len(block) for block in blocks], dim=1), strict=True):
            torch.mm(rows, block.float().t(), out=columns)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        blocks = _blocks(ctx.weight)
        rows = grads[0].reshape(-1, ctx.weight.shape[0])  # with three dimensions, torch multiplies sample by sample
        parts = rows.split([len(block) for block in blocks], dim=1)
        out = parts[0] @ blocks[0].float()
        for part, block in zip(parts[1:], blocks[1:], strict=True):
            out.addmm_(part, block.float())
        return out.view(*grads[0].shape[:-1], -1), None


def _blocks(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.split(max(1, BLOCK_ELEMENTS // weight.shape[1]))
