"""Data settings for `hfedmoe evaluate` on other rows than the run's: a known data set or a file."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import cast

from hfedmoe.config import DataConfig, RunConfig
from hfedmoe.config.data import Kind
from hfedmoe.data.decoding import Form
from hfedmoe.data.kinds import has_columns_of
from hfedmoe.data.known import KNOWN, known_set
from hfedmoe.data.sources import read
from hfedmoe.errors import UserError

OF_NAMED_SETS = {"chat", "label_words", "max_tokens", "revision", "split", "subset", "template", "test", "test_rows"}
"""Settings of `data` that apply to a known data set, which has fixed columns."""


def task_data(
    task: str, config: RunConfig, limit: int | None = None, rows: Path | None = None, given: Collection[str] = ()
) -> DataConfig:
    """The data settings of `hfedmoe evaluate --task NAME[:SUBSET] --limit N --rows FILE --set data.KEY=VALUE`.

    Args:
        given: the keys of `--set`; from the config's data settings only these, max_tokens and chat are used.

    Raises:
        UserError: no data set has that name, it has no subsets, or a key does not apply to it.
    """
    check_task_name(task)
    name, _, subset = task.partition(":")
    if subset and rows is not None:
        raise UserError(
            f"--task {task} with --rows: a file is measured whole; use --task {name} and a file that holds {subset}"
        )
    if subset and KNOWN[name].hub is None:
        raise UserError(f"--task {task}: {name} has no subsets; use --task {name}")
    strangers = sorted(set(given) - OF_NAMED_SETS)
    if strangers:
        raise UserError(
            f"--set data.{strangers[0]}: {name} has its own source and columns; leave the setting out, or evaluate a "
            "file by its columns with --rows alone"
        )
    own = config.data
    split = _given_split(own, given)
    changed: dict[str, object] = {key: getattr(own, key) for key in {*given, "max_tokens", "chat"} - {"split", "test"}}
    changed |= {"source": name, "format": name, "test": split}
    if rows is not None:
        changed |= {"source": _local(rows), "split": split or _test_split(rows, KNOWN[name].test), "test": None}
    if subset:
        changed["subset"] = subset
    if "test_rows" not in given or limit is not None:
        changed["test_rows"] = limit
    return DataConfig.model_validate(changed)


def check_task_name(task: str) -> None:
    """Raise UserError if `--task NAME[:SUBSET]` names no data set."""
    if task.partition(":")[0] not in KNOWN:
        raise UserError(f"--task {task}: not a known data set; known: {', '.join(KNOWN)}")


def rows_data(rows: Path, config: RunConfig, limit: int | None = None, given: Collection[str] = ()) -> DataConfig:
    """The data settings of `hfedmoe evaluate --rows FILE --limit N --set data.KEY=VALUE`.

    Columns and template are those of the config. So is the format, if the file has its columns; else the file's
    columns decide.

    Args:
        given: the keys of `--set`.

    Raises:
        UserError: the file or folder does not exist or cannot be read.
    """
    own = config.data
    # The default of data.source does not count: only a source that the config sets names a data set.
    known = known_set(own) if own.format != "auto" or "source" in own.model_fields_set else None
    split = _given_split(own, given) or _test_split(rows, "test" if known is None else known.test)
    format: str = own.format if known is None else known.name
    changed: dict[str, object] = {"source": _local(rows), "test": None, "clients": None, "subset": None, "split": split}
    if "format" not in given and format != "auto":
        table = read(_local(rows), (), split, form=Form.of(own))
        fits = has_columns_of(cast(Kind, format), table, own) if known is None else known.reads(table)
        if not fits:
            format = "auto"
            # Labels, and words for labels, that these rows do not have would be errors.
            changed |= {
                key: getattr(own, key) if key in given else None for key in ("labels", "label_words", "template")
            }
    changed |= {"format": format, "test_rows": own.test_rows if limit is None and "test_rows" in given else limit}
    return own.model_copy(update=changed)


def _given_split(own: DataConfig, given: Collection[str]) -> str | None:
    """The split that `--set` names; None: none."""
    return own.split if "split" in given else own.test if "test" in given else None


def _test_split(rows: Path, usual: str) -> str:
    """The split to evaluate on: `usual`, or `test` if a folder of `save_to_disk` has that one instead."""
    listed = rows.expanduser() / "dataset_dict.json"
    if not listed.is_file():
        return usual
    try:
        splits = json.loads(listed.read_text(encoding="utf-8")).get("splits", [])
    except (OSError, ValueError, AttributeError):  # reading the rows reports what is wrong with the folder
        return usual
    return next((name for name in (usual, "test") if name in splits), usual)


def _local(rows: Path) -> str:
    """The path of a local file or folder, never a hub id. Raises UserError if it does not exist."""
    path = rows.expanduser()
    if not path.exists():
        raise UserError(f"--rows {rows}: no such file or folder")
    # A folder may have the same name as a known data set; an absolute path cannot be confused with it.
    return str(path.absolute() if path.is_dir() else path)
