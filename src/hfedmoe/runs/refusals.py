"""What can be refused at once, before torch, transformers or flwr are imported: names of what is not there."""

from pathlib import Path

from hfedmoe.config import DataConfig, ModelConfig
from hfedmoe.data.sources import is_file
from hfedmoe.errors import UserError
from hfedmoe.models.names import PACKAGED_MODELS, locate


def require_model(config: ModelConfig) -> None:
    """Raise UserError if the model is a file or folder that is not there, or no model."""
    if config.name not in PACKAGED_MODELS:
        locate(config)


def require_data(config: DataConfig) -> None:
    """Raise UserError if a file of the data is not there."""
    for source in (*(config.clients or [config.source]), config.test):
        if source is not None and is_file(source) and not Path(source).expanduser().is_file():
            raise UserError(f"{source}: no such file")
