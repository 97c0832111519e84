"""Whether there is a run folder at a path; needs nothing that takes time to import."""

from pathlib import Path

from hfedmoe.errors import UserError


def require_run(folder: Path) -> None:
    """Raise UserError if there is no such run folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder; `ls runs` shows what is there")
    if not (folder / "config.toml").is_file():
        raise UserError(f"{folder}: not a run folder (it has no config.toml); name a folder below runs/")


def meant_as_run(folder: Path) -> bool:
    """Whether a path that does not exist was meant as a run folder: it lies where runs are."""
    parent = folder.parent
    return not folder.exists() and (parent.name == "runs" or any(parent.glob("*/run.json")))
