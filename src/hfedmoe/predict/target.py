"""What `predict` and `chat` need before they do anything heavy: a run or an export, and settings that may change."""

from collections.abc import Sequence
from pathlib import Path

from hfedmoe.errors import UserError
from hfedmoe.runs.existing import is_export, run_at


def check_keys(overrides: Sequence[str] | None, allowed: Sequence[str]) -> None:
    """Raise UserError if `--set` changes a setting that is not in `allowed`."""
    for text in overrides or []:
        key = text.partition("=")[0].strip()
        if key not in allowed:
            raise UserError(f"--set {key}: a run keeps its own settings; these can change: {', '.join(allowed)}")


def check_target(target: Path, checkpoint: str | None) -> Path:
    """The folder of a run or an export.

    Args:
        checkpoint: of a run; None: not asked for.

    Raises:
        UserError: it is neither, is damaged, has no such checkpoint, or is an export, which has only one.
    """
    from hfedmoe.export.task_file import read_task

    place = target.expanduser()
    of_run = (place / "config.toml").is_file()
    if not of_run and not is_export(place):
        raise UserError(
            f"{target}: neither a run folder (no config.toml) nor an export (no hfedmoe.json); `hfedmoe export` "
            "writes one of a run"
        )
    if not of_run and checkpoint is not None:
        raise UserError(f"--checkpoint: {target} is an export, which has only one; leave the option out")
    if of_run:
        run_at(place, checkpoint or "best")
    else:
        read_task(place)
    return place
