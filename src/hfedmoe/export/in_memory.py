"""A run's trained model in memory, as a stock transformers model: an export that is not written."""

from pathlib import Path

import torch

from hfedmoe.config import RunConfig
from hfedmoe.errors import UserError
from hfedmoe.export.merged import merge
from hfedmoe.models.carved import quantisation_of
from hfedmoe.models.loaded import Loaded
from hfedmoe.models.loading import load
from hfedmoe.models.wrapping import wrap
from hfedmoe.runs.choice import checkpoint_of, load_checkpoint
from hfedmoe.runs.folder import RunFolder
from hfedmoe.runs.identity import check_base


def trained_model(path: Path, checkpoint: str = "best", device: str | None = None) -> Loaded:
    """The model of a checkpoint, with what was trained merged into its weights, and its tokenizer.

    Args:
        checkpoint: "best", "last" or the number of a round.
        device: as torch names it; None: the one of the run.

    Raises:
        UserError: no such run or checkpoint, or the base model is quantised or has changed.
    """
    with RunFolder.open(path) as run:
        chosen = checkpoint_of(run, checkpoint)
        config = for_merging(run.config, device or run.config.model.device)
        method = quantisation_of(config.model)
        if method is not None:
            raise UserError(
                f"model.name = {config.model.name}: is quantised ({method}), so trained changes cannot be merged into "
                "its weights; `hfedmoe export --as adapter` writes them by themselves"
            )
        check_base(path, config)
        loaded = load(config.model, config.seed)
        model = wrap(loaded.model, config, loaded.store)
        load_checkpoint(chosen, model)
        merge(model, getattr(torch, config.model.dtype))
        loaded.model.eval()
        return loaded


def for_merging(config: RunConfig, device: str) -> RunConfig:
    """The settings for a model to be merged: whole, and of stock modules, which float32 arithmetic would replace."""
    plain = {"device": device, "compute": "same", "expert_dtype": "same"}
    train = config.train.model_copy(update={"gradient_checkpointing": False})
    return config.model_copy(update={"model": config.model.model_copy(update=plain), "train": train})
