"""The configs that ship with hfedmoe: `configs/` of the repository, copied into the package when it is built."""

from pathlib import Path

NAMES = ("demo", "tiny")


def shipped_config(name: str) -> Path:
    """The file of a shipped config, in an installed package or in a clone."""
    packaged = Path(__file__).parents[1] / "configs"
    folder = packaged if packaged.is_dir() else Path(__file__).parents[3] / "configs"
    return folder / f"{name}.toml"
