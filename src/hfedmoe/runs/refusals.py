"""Quick checks that files, folders and libraries exist, before torch, transformers or flwr are imported."""

import importlib.util
from pathlib import Path

from hfedmoe.config import DataConfig, ModelConfig, TrackingConfig
from hfedmoe.data.sources import is_file
from hfedmoe.errors import UserError
from hfedmoe.models.names import PACKAGED_MODELS, locate


def require_model(config: ModelConfig) -> None:
    """Raise UserError if the model is a file or folder that does not exist or is not a model."""
    if config.name not in PACKAGED_MODELS:
        locate(config)


def require_data(config: DataConfig) -> None:
    """Raise UserError if a data file does not exist."""
    for source in (*(config.clients or [config.source]), config.test):
        if source is not None and is_file(source) and not Path(source).expanduser().is_file():
            raise UserError(f"{source}: no such file")


def require_trackers(config: TrackingConfig) -> None:
    """Raise UserError if the library of a tracker is not installed."""
    for name in config.to:
        if not is_installed(name):
            raise UserError(f"tracking.to: {name} is not installed; pip install 'hfedmoe[{name}]'")


def is_installed(library: str) -> bool:
    """Whether there is a package of this name; a folder, such as the `wandb` that W&B writes, is none."""
    found = importlib.util.find_spec(library)
    return found is not None and found.origin is not None
