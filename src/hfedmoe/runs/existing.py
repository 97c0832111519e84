"""Whether there is a run folder at a path; needs nothing that takes time to import."""

from pathlib import Path
from typing import TYPE_CHECKING

from hfedmoe.errors import UserError

if TYPE_CHECKING:
    from hfedmoe.runs.folder import RunFolder

EXPORT = "hfedmoe.json"
"""The file that tells an export from another checkpoint (`export.task_file`)."""


def is_export(folder: Path) -> bool:
    """Whether a folder is an export of a run that says what its task is."""
    return (folder / EXPORT).is_file()


def run_at(folder: Path, checkpoint: str | None = None) -> "RunFolder":
    """The run in a folder. Raises UserError at once if there is none, it is damaged, or has no such checkpoint."""
    require_run(folder)
    from hfedmoe.runs.choice import which_of
    from hfedmoe.runs.folder import RunFolder

    found = RunFolder.open(folder)
    if checkpoint is not None:
        found.require_checkpoint(which_of(checkpoint))
    return found


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
