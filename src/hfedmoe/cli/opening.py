"""What commands need before they do anything heavy: a configuration, and files and folders that exist."""

from pathlib import Path
from typing import TYPE_CHECKING

from hfedmoe.errors import UserError
from hfedmoe.runs.existing import is_export, meant_as_run, require_run

if TYPE_CHECKING:
    from hfedmoe.config import DataConfig, RunConfig


def load(config: Path | None, overrides: list[str] | None) -> "RunConfig":
    """A configuration by file or shipped name, with `--set` overrides. Raises UserError."""
    from hfedmoe.config.builtin import load_named

    return load_named(config, overrides)


def require_files(settings: "RunConfig") -> None:
    """Raise UserError at once if files that the settings name do not exist."""
    from hfedmoe.runs.refusals import require_settings

    require_settings(settings)


def require_data(data: "DataConfig") -> None:
    """Raise UserError at once if files of rows do not exist."""
    from hfedmoe.runs import refusals

    refusals.require_data(data)


def require_named(name: str) -> None:
    """Raise UserError at once if a model's name is a path that does not exist or is not a model."""
    from hfedmoe.config import ModelConfig
    from hfedmoe.runs.refusals import require_model

    require_model(ModelConfig(name=name))


def require_target(target: str) -> None:
    """As `require_named`, for a target that may have been meant as a run."""
    path = Path(target).expanduser()
    if is_export(path):  # perhaps of an adapter
        return
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{target}: neither a run folder (no config.toml) nor a model (no config.json)")
    if meant_as_run(path):
        require_run(path)
    require_named(target)


def keys_of(overrides: list[str] | None) -> list[str]:
    """The keys that `--set` names."""
    return [text.partition("=")[0].strip() for text in overrides or []]
