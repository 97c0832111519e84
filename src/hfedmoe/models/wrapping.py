"""Prepare a loaded model for training with the settings of the configuration."""

import torch

from hfedmoe.config import RunConfig
from hfedmoe.errors import UserError
from hfedmoe.method.methods import METHODS
from hfedmoe.models.loaded import device_of
from hfedmoe.moe.anatomy import UnsupportedModelError
from hfedmoe.moe.compact import compute_in_float32, wants_float32
from hfedmoe.moe.experts.store import ExpertStore
from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.weights.shards import CheckpointError


def wrap(model: object, config: RunConfig, store: ExpertStore | None = None, masked: bool = True) -> MoEModel:
    """Prepare a transformers model for training.

    Args:
        store: holds the experts, if the model does not; `masked`: the model holds all experts and masks some.

    Raises:
        UserError: it is not a supported MoE model, or the settings contradict each other.
    """
    settings = config.train
    method = METHODS[config.method.name]
    experts = method.trained_experts(settings.experts)
    if experts == "frozen" and not settings.router and not settings.attention:
        raise UserError("nothing would be trained: set train.experts, train.router or train.attention")
    if settings.experts == "full" and config.model.expert_dtype not in ("same", "float32"):
        raise UserError(
            f'train.experts = "full" with model.expert_dtype = "{config.model.expert_dtype}": small updates would be '
            'rounded away; use "same", or train.experts = "lora"'
        )
    if settings.experts == "full" and config.model.dtype != "float32":
        raise UserError(
            f'train.experts = "full" with model.dtype = "{config.model.dtype}": small updates would be rounded away; '
            'use float32, or train.experts = "lora", whose adapters are float32'
        )
    dtype = getattr(torch, config.model.dtype)
    try:
        if wants_float32(config.model.compute, device_of(config.model.device), dtype, here=True):
            compute_in_float32(model)
        wrapped = MoEModel(
            model,
            experts=experts,
            rank=settings.rank,
            alpha=settings.alpha,
            freeze_a=settings.lora == "freeze_a",
            router=settings.router,
            attention=settings.attention,
            seed=config.seed,
            off_budget=config.clients.off_budget,
            store=store,
            masked=masked,
            scales=method.experts_per_token is not None,
            own=method.own,
        )
    except (UnsupportedModelError, CheckpointError) as error:
        raise UserError(f"model.name = {config.model.name}: {error}") from None
    if settings.gradient_checkpointing:
        wrapped.checkpoint_activations()
    return wrapped
