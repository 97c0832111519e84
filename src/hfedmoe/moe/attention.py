"""LoRA on all linear layers of the attention, through PEFT."""

from typing import Any

import torch
from torch import Tensor

from hfedmoe.moe.anatomy import UnsupportedModelError
from hfedmoe.moe.compact import CompactLinear
from hfedmoe.moe.experts.trained import fresh_a

A, B = ".lora_A.", ".lora_B."
"""Parts of the names of the two factors: A [R, in] and B [out, R]."""


def is_attention(name: str) -> bool:
    """Whether a parameter or module of this name belongs to the attention; its norms do not."""
    return any("att" in part.lower() and "norm" not in part for part in name.split(".")[:-1])


def add_attention_lora(model: Any, rank: int, alpha: float, seed: int, freeze_a: bool = False) -> dict[str, Tensor]:
    """Add new adapters to the model; returns the factors A and B by the names under which they are sent, `shared.*`.

    The same seed gives the same A, bit for bit, on every device and in every precision.

    Args:
        alpha: the low-rank term is scaled by alpha / rank.
        freeze_a: A stays as it is and only B is trained (FFA-LoRA).

    Raises:
        UnsupportedModelError: the attention has no linear layers, or PEFT has no LoRA for them.
    """
    from peft import LoraConfig, inject_adapter_in_model  # imported here because it takes 70 MB

    # Full names: the attention and the feed-forward network may both have a gate_proj.
    targets = [name for name, module in model.named_modules() if _is_plain_linear(module) and is_attention(name)]
    if not targets:
        raise UnsupportedModelError(f"{type(model).__name__}: no attention projections found to put LoRA on")
    state = torch.random.get_rng_state()
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    try:
        inject_adapter_in_model(settings, model)
    except ValueError as error:  # for example, PEFT takes the attention's gate_proj for fused experts
        raise UnsupportedModelError(f"{type(model).__name__}: PEFT has no LoRA for this attention ({error})") from None
    torch.random.set_rng_state(state)
    factors = {name: parameter for name, parameter in model.named_parameters() if A in name or B in name}
    generator = torch.Generator().manual_seed(seed)
    for name, factor in factors.items():
        factor.data = factor.data.float()  # PEFT casts its inputs; in 16 bit, small updates would be lost
        if A in name:
            factor.data.copy_(fresh_a(tuple(factor.shape), generator))
        factor.requires_grad_(not (freeze_a and A in name))
    return {f"shared.{name}": factor for name, factor in factors.items()}


def _is_plain_linear(module: torch.nn.Module) -> bool:
    """Whether it is a linear layer with the forward that PEFT expects; some families have subclasses with another."""
    return type(module) is torch.nn.Linear or isinstance(module, CompactLinear)
