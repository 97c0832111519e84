"""What is known about a data set, and one of its rows."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hfedmoe.config import DataConfig
from hfedmoe.config.data import Kind
from hfedmoe.data.example import Example
from hfedmoe.data.labels import label_words
from hfedmoe.data.rows import Rows, short
from hfedmoe.errors import UserError


@dataclass(frozen=True)
class Row:
    """One row in its own schema, with errors that name file, line and column."""

    rows: Rows
    index: int

    def has(self, column: str) -> bool:
        """Whether the table has the column."""
        return column in self.rows.columns

    def holds(self, column: str) -> bool:
        """Whether the row has something in the column."""
        return self.has(column) and self.rows.columns[column][self.index] is not None

    def cell(self, column: str) -> Any:
        """The cell as it is. Raises UserError if there is no such column, or nothing in it."""
        if column not in self.rows.columns:
            present = ", ".join(self.rows.names) or "none"
            raise UserError(f'{self.rows.origin}: no column "{column}"; columns present: {present}; check data.format')
        value = self.rows.columns[column][self.index]
        if value is None:
            raise self.error(column, "is missing; fill it in or remove the row")
        return value

    def text(self, column: str, empty: bool = False) -> str:
        """The cell as text, with its spaces. Raises UserError if it is none, or `empty` is not allowed and it is."""
        value = self.cell(column)
        if not isinstance(value, str):
            raise self.error(column, f"must be text, got {short(value)}")
        if not empty and not value.strip():
            raise self.error(column, "is empty; fill it in or remove the row")
        return value

    def texts(self, column: str) -> tuple[str, ...]:
        """The cell as a list of texts. Raises UserError if it is none."""
        return self.checked_texts(column, self.cell(column))

    def checked_texts(self, column: str, value: Any) -> tuple[str, ...]:
        """`value` as a list of texts, which may be empty; `column` names it. Raises UserError if it is none.

        lm-evaluation-harness scores a row with an empty option or a single one, so it is measured here as well.
        """
        if not isinstance(value, list) or not value or not all(isinstance(t, str) for t in value):
            raise self.error(column, f"must be a list of texts, got {short(value)}")
        return tuple(value)

    def index_of(self, column: str, count: int) -> int:
        """The cell as an index below `count`: a number, its digits, or a letter from A. Raises UserError if it is none.

        The hub's loader turns numbers into names where a column is declared as labels.
        """
        value = self.cell(column)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # pandas makes 1.0 of 1 where another row has none
        if isinstance(value, str) and value.strip().isdecimal():
            value = int(value)
        elif isinstance(value, str) and len(value) == 1:
            value = ord(value) - ord("A")
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
            raise self.error(column, f"must be a number from 0 to {count - 1}, got {short(self.cell(column))}")
        return value

    def error(self, column: str, problem: str) -> UserError:
        """An error about one cell."""
        return UserError(f'{self.rows.at(self.index)}: column "{column}" {problem}')


@dataclass(frozen=True)
class Wording:
    """How the configuration wants examples put: the word for each label, and how conversations are written."""

    words: tuple[str, ...]
    plain: bool
    merge_system: bool = False


@dataclass(frozen=True)
class KnownSet:
    """One data set.

    Args:
        name: for `data.source`, `data.format` and `hfedmoe evaluate --task`.
        kind: of task.
        hub: its id on the hub; None: `sources.read` knows the name.
        columns: those that a row needs; `optional` ones are read if they are there.
        examples: what one row becomes; no examples for a row that has nothing to learn from.
        template: the prompt around the text, unless `data.template` says otherwise.
        subset: its configuration on the hub, unless `data.subset` says otherwise.
        train: its training split; `subset_train`: that of a subset which was asked for.
        test: its split for measuring.
        has_columns: whether a table has what a row needs, where there are several ways; None: all of `columns`.
        labels: sorted (classification); `words` holds what the model says, where that is not the label itself.
    """

    name: str
    kind: Kind
    columns: tuple[str, ...]
    examples: Callable[[Row, Wording], list[Example]]
    template: str
    hub: str | None = None
    subset: str | None = None
    train: str = "train"
    subset_train: str | None = None
    test: str = "test"
    labels: tuple[str, ...] = ()
    words: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    has_columns: Callable[[Collection[str]], bool] | None = None

    def reads(self, rows: Rows) -> bool:
        """Whether a table has the columns that its rows need."""
        if self.has_columns is not None:
            return self.has_columns(rows.names)
        return set(self.columns) <= set(rows.names)

    def train_split(self, config: DataConfig) -> str:
        """The split to train on."""
        own = self.train if config.subset is None else self.subset_train or self.train
        return config.split or own

    def wording(self, config: DataConfig) -> Wording:
        """The words of the configuration, else the data set's own. Raises UserError if they are unusable."""
        words = {**self.words, **(config.label_words or {})}
        used = label_words(self.labels, config.model_copy(update={"label_words": words}))
        return Wording(used, config.chat == "plain", config.chat_system == "merge")

    def read_rows(self, rows: Rows, wording: Wording) -> Iterator[list[Example]]:
        """The examples of every row, read when asked for. Raises UserError for a row that is not as it should be."""
        for index in range(len(rows)):
            found = self.examples(Row(rows, index), wording)
            yield [replace(example, origin=rows.at(index)) for example in found]
