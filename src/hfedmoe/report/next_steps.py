"""What to do next, from what is in a folder: runs, configs and files of rows."""

import shlex
from collections.abc import Callable
from pathlib import Path

from hfedmoe.config import load_config
from hfedmoe.errors import UserError
from hfedmoe.models.domains import NAME as BUILT_IN
from hfedmoe.report.step import Step
from hfedmoe.runs.folder import RunFolder
from hfedmoe.runs.refusals import require_data

ROWS = (".csv", ".tsv", ".jsonl", ".parquet")
"""Suffixes of files that are rows; .json is too often something else."""
MOST_FILES = 1000
"""Entries of a folder that are looked at."""


def next_steps(here: Path, built_in_model: bool) -> list[Step]:
    """One or two steps that make sense in a folder.

    Args:
        built_in_model: whether the model of the built-in example can be made.
    """
    run = _newest(here / "runs", "*/config.toml")
    if run is not None:
        steps = _after(run.parent, here)
        if steps:
            return steps
    config = _newest(here, "*.toml", _runs)
    if config is not None:
        return [Step(f"hfedmoe run {_shown(config, here)}", "run this config")]
    rows = next((file for suffix in ROWS if (file := _newest(here, f"*{suffix}"))), None)
    model = BUILT_IN if built_in_model else "tiny"
    if rows is not None:
        return [Step(f"hfedmoe init {_shown(rows, here)} --model {model}", "write a config for these rows")]
    example = Step("hfedmoe run", "the built-in example, in some minutes")
    first = example if built_in_model else Step("hfedmoe run tiny", "a complete run in seconds")
    return [first, Step(f"hfedmoe init FILE --model {model}", "your own rows: a CSV, JSONL or Parquet file")]


def _after(run: Path, here: Path) -> list[Step]:
    """What to do with a run; nothing if it cannot be read."""
    try:
        folder = RunFolder.open(run)
    except UserError:
        return []
    shown, rounds = _shown(run, here), folder.saved_rounds()
    if not rounds or max(rounds) < folder.config.federation.rounds:
        return [
            Step(f"hfedmoe resume {shown}", "go on with this run, if it was interrupted"),
            Step(f"hfedmoe watch {shown}", "look at it, while it goes on"),
        ]
    return [
        Step(f"hfedmoe chat {shown}", "try the model of this run"),
        Step(f"hfedmoe export {shown} OUT", "write it for transformers or PEFT"),
    ]


def _runs(path: Path) -> bool:
    """Whether a TOML file is a config whose data is there."""
    try:
        require_data(load_config(path).data)
    except UserError:
        return False
    return True


def _newest(folder: Path, pattern: str, fits: Callable[[Path], bool] = Path.is_file) -> Path | None:
    """The newest file of a pattern that fits; None: there is none, or the folder cannot be read."""
    try:
        found = [(path.stat().st_mtime, path) for path, _ in zip(folder.glob(pattern), range(MOST_FILES), strict=False)]
    except OSError:
        return None
    return next((path for _, path in sorted(found, reverse=True) if fits(path)), None)


def _shown(path: Path, here: Path) -> str:
    return shlex.quote(str(path.relative_to(here)))
