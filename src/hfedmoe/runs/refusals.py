"""Quick checks that files, folders and libraries exist, before torch, transformers or flwr are imported."""

import importlib.util
from pathlib import Path

from hfedmoe.config import DataConfig, ModelConfig, RunConfig, TrackingConfig
from hfedmoe.data.known import KNOWN
from hfedmoe.data.sources import IN_WHEEL, is_file, is_packaged, require_saved
from hfedmoe.errors import UserError
from hfedmoe.files.hub import why_not_on_hub
from hfedmoe.models.dense import refuse_dense
from hfedmoe.models.names import PACKAGED_MODELS, locate


def require_settings(config: RunConfig) -> None:
    """Raise UserError if something that the settings name is not there, or the model is dense."""
    require_model(config.model)
    refuse_dense(config.model)
    require_data(config.data)
    require_trackers(config.tracking)


def require_model(config: ModelConfig) -> None:
    """Raise UserError if the model is a file or folder that does not exist or is no model, or a hub id out of reach."""
    if config.name in PACKAGED_MODELS:
        return
    source, gguf = locate(config)
    if gguf or Path(source).is_dir():
        return
    if (problem := why_not_on_hub(config.name, "config.json", config.revision)) is not None:
        raise UserError(
            f"model.name = {config.name}: no folder has this name, and {problem}; name a folder, a hub id (owner/name) "
            f"that can be reached, or one of {', '.join(PACKAGED_MODELS)}"
        )


def require_data(config: DataConfig) -> None:
    """Raise UserError if a data file does not exist, or a data folder was not written by `datasets`."""
    for source in (*(config.clients or [config.source]), config.test):
        if source is None or is_packaged(source) or source in IN_WHEEL or source in KNOWN:
            continue
        path = Path(source).expanduser()
        if path.is_dir() and source != config.test:  # the name of a split may be that of a folder
            require_saved(path)
        elif is_file(source) and not path.is_file():
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
