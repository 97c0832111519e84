"""Quick checks that files and folders exist, before torch, transformers or flwr are imported."""

from pathlib import Path

from hfedmoe.config import DataConfig, ModelConfig
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
