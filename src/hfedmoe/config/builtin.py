"""The configs that ship with hfedmoe: `configs/` of the repository, copied into the package when it is built."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hfedmoe.config import RunConfig

NAMES = ("demo", "tiny")


def shipped_config(name: str) -> Path:
    """The file of a shipped config, in an installed package or in a clone."""
    packaged = Path(__file__).parents[1] / "configs"
    folder = packaged if packaged.is_dir() else Path(__file__).parents[3] / "configs"
    return folder / f"{name}.toml"


def load_named(config: Path | None, overrides: list[str] | None) -> "RunConfig":
    """The settings of a config file, of a shipped config by name, or of the built-in example. Raises UserError."""
    from hfedmoe.config import load_config

    if config is None:
        config = shipped_config("demo")
    elif str(config) in NAMES and not config.is_file():  # a folder of that name is no config
        config = shipped_config(str(config))
    return load_config(config, overrides)
