"""Bytes of a client's sub-model, counted from shapes, and the peak memory of a device that trains."""

import torch
from torch import Tensor

from hfedmoe.device.peak import peak_process_bytes
from hfedmoe.moe.model import MoEModel


def sub_model_bytes(model: MoEModel, resident: list[Tensor]) -> int:
    """Predicted bytes of weights, gradients and AdamW state of a device that holds only `resident`, bool [E] per layer.

    Every resident expert counts in full, even if copies share memory in this process. Activations do not count.
    """
    expert_parameters = {id(p) for layer in model.layers for p in layer.experts.parameters()}
    total = sum(p.numel() * p.element_size() for p in model.model.parameters() if id(p) not in expert_parameters)
    trained = [*model.routers.values(), *model.shared.values(), *model.own.values()]
    total += sum(3 * t.numel() * t.element_size() for t in trained)  # gradient and two moments
    for state, keep in zip(model.states, resident, strict=True):
        held = int(keep.sum())
        more = 0 if state.merged is None else state.merged.number
        more += 1 if state.own is not None and state.own.kind == "graft" else 0
        total += (held + more) * state.expert_bytes()
        if state.trained is not None:
            for name, stack in state.trained.stacks.items():
                row = stack[0].numel() * stack.element_size()
                own = 0 if name in ("up", "down", "up_bias", "down_bias") else 1  # full training trains the base itself
                total += held * row * (own + (3 if name in state.trained.travelling else 0))
    return total


def peak_bytes(device: torch.device) -> int:
    """Peak memory of this process so far on the device where it trains: CUDA memory, or else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return peak_process_bytes()
