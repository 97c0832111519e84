"""Read the files of `hfedmoe init`, every column of them."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from hfedmoe.data.decoding import Form
from hfedmoe.data.files import read_file
from hfedmoe.data.normal import key_of
from hfedmoe.data.rows import Rows
from hfedmoe.errors import UserError
from hfedmoe.starting.columns import Roles, roles_of


@dataclass(frozen=True)
class Seen:
    """What is in the files."""

    tables: list[Rows]
    """One for each file."""
    rows: Rows
    """The rows of all files, with the columns that all have."""
    roles: Roles

    @property
    def labels(self) -> Counter[str]:
        """How often each label occurs; empty without labels."""
        label = self.roles.columns.get("label")
        return Counter() if label is None else Counter(self.values(label))

    def values(self, column: str) -> list[str]:
        """The cells of a column that names something."""
        return [key_of(cell) for cell in self.rows.columns[column] if cell is not None]


def look(files: list[str], form: Form, given: dict[str, str]) -> Seen:
    """Read all files and find out what their columns are.

    Args:
        given: what the user said of section [data] (`columns.roles_of`).

    Raises:
        UserError: a file cannot be read, the files have no columns in common, or nothing can be learnt of them.
    """
    tables = [_table(Path(file).expanduser(), form) for file in files]
    rows = tables[0] if len(tables) == 1 else _together(tables)
    return Seen(tables, rows, roles_of(rows, given))


def _table(path: Path, form: Form) -> Rows:
    return read_file(path, read_file(path, (), form).names, form)


def _together(tables: list[Rows]) -> Rows:
    names = [name for name in tables[0].names if all(name in table.columns for table in tables)]
    if not names:
        other = next(table for table in tables if not set(table.names) & set(tables[0].names))
        raise UserError(
            f"{other.origin}: has other columns ({', '.join(other.names)}) than {tables[0].origin} "
            f"({', '.join(tables[0].names)}); give all files the same"
        )
    columns = {name: [cell for table in tables for cell in table.columns[name]] for name in names}
    return Rows(f"{tables[0].origin} and {len(tables) - 1} more", names, columns, sum(map(len, tables)))
