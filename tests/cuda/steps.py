"""Forward and backward passes of tiny models, the same on every device: nothing is drawn on the device."""

from typing import Any

import torch
from torch import Tensor

from hfedmoe.moe.model import MoEModel
from tests.families.table import build, inputs

RANK, ALPHA = 8, 16.0
CPU = torch.device("cpu")


def wrapped(family: str, device: torch.device, **options: Any) -> MoEModel:
    """A tiny model of a family on a device, with LoRA pairs that change it."""
    model = MoEModel(build(family).to(device), rank=RANK, alpha=ALPHA, **options)
    fill_adapters(model)
    return model


def fill_adapters(model: MoEModel) -> None:
    """Put random numbers into the LoRA pairs: with B at zero, A would have no gradient."""
    draws = torch.Generator().manual_seed(5)
    for state in model.states:
        if state.trained is not None and "up_a" in state.trained.stacks:
            for stack in state.trained.stacks.values():
                stack.copy_(torch.randn(stack.shape, generator=draws) * 0.3)


def batch_for(model: MoEModel) -> dict[str, Tensor]:
    """A padded batch on the model's device."""
    return {name: tensor.to(model.device) for name, tensor in inputs(model.model).items()}


def loss_of(logits: Tensor) -> Tensor:
    """A loss in which every logit counts differently."""
    mix = torch.linspace(-1, 1, logits.shape[-1]).to(logits.device)
    return (logits.float().log_softmax(-1) * mix).sum()


def stepped(model: MoEModel, batch: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """The logits, and the gradient of everything that is trained, by name."""
    logits = model.model(**batch, use_cache=False).logits
    loss_of(logits).backward()
    found: dict[str, Tensor | None] = {"logits": logits.detach()}
    found |= {f"grad {name}": tensor.grad for name, tensor in model.routers.items()}
    found |= {f"grad {name}": tensor.grad for name, tensor in model.shared.items()}
    for layer, state in enumerate(model.states):
        for name, leaves in ({} if state.trained is None else state.trained.leaves).items():
            found |= {f"grad {layer}.{name}.{expert}": leaf.grad for expert, leaf in enumerate(leaves)}
    return found
