"""The description of a known data set, and one of its rows."""

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
    """One row; its errors name file, line and column."""

    rows: Rows
    index: int
    answered: bool = True
    """False: the right choice is to be predicted, and the first one stands in for it."""

    def has(self, column: str) -> bool:
        """Whether the table has the column."""
        return column in self.rows.columns

    def holds(self, column: str) -> bool:
        """Whether the row has a value in the column."""
        return self.has(column) and self.rows.columns[column][self.index] is not None

    def cell(self, column: str) -> Any:
        """The unchanged cell. Raises UserError if there is no such column, or the cell is missing."""
        if column not in self.rows.columns:
            present = ", ".join(self.rows.names) or "none"
            raise UserError(f'{self.rows.origin}: no column "{column}"; columns present: {present}; check data.format')
        value = self.rows.columns[column][self.index]
        if value is None:
            raise self.error(column, "is missing; fill it in or remove the row")
        return value

    def text(self, column: str, empty: bool = False) -> str:
        """The cell as text, with its spaces. Raises UserError if it is not text, or empty without `empty`."""
        value = self.cell(column)
        if not isinstance(value, str):
            raise self.error(column, f"must be text, got {short(value)}")
        if not empty and not value.strip():
            raise self.error(column, "is empty; fill it in or remove the row")
        return value

    def texts(self, column: str) -> tuple[str, ...]:
        """The cell as a list of texts. Raises UserError if it is not one."""
        return self.checked_texts(column, self.cell(column))

    def checked_texts(self, column: str, value: Any) -> tuple[str, ...]:
        """`value`, from the cell in `column`, as a list of texts. Raises UserError if it is not one, or is empty.

        A text may be empty, and there may be only one: lm-evaluation-harness scores such rows too.
        """
        if not isinstance(value, list) or not value or not all(isinstance(t, str) for t in value):
            raise self.error(column, f"must be a list of texts, got {short(value)}")
        return tuple(value)

    def index_of(self, column: str, count: int) -> int:
        """The cell as an index below `count`: a number, digits, or a letter from A. Raises UserError otherwise.

        The letters: the hub's loader replaces numbers by names if a column is declared as labels. 0 if the row is not
        `answered`.
        """
        if not self.answered:
            return 0
        value = self.cell(column)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # pandas writes 1 as 1.0 if another row is empty
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
    """The word for each label, and how conversations are written, from the configuration."""

    words: tuple[str, ...]
    plain: bool
    merge_system: bool = False


@dataclass(frozen=True)
class KnownSet:
    """A known data set.

    Args:
        name: for `data.source`, `data.format` and `hfedmoe evaluate --task`.
        kind: of task.
        hub: id on the hub; None: `sources.read` knows the name.
        columns: required columns; `optional` ones are read if they exist.
        examples: makes the examples of one row; none for a row with nothing to learn.
        template: the prompt, unless `data.template` is set.
        subset: its configuration on the hub, unless `data.subset` is set.
        train: training split; `subset_train`: the same if `data.subset` is set.
        test: split for evaluation.
        has_columns: whether a table has the needed columns, if there are several schemas; None: all of `columns`.
        labels: sorted (classification); `words`: label -> word for the model, if that is not the label itself.
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
        """Whether a table has the needed columns."""
        if self.has_columns is not None:
            return self.has_columns(rows.names)
        return set(self.columns) <= set(rows.names)

    def train_split(self, config: DataConfig) -> str:
        """The split to train on."""
        own = self.train if config.subset is None else self.subset_train or self.train
        return config.split or own

    def wording(self, config: DataConfig) -> Wording:
        """The words of the configuration, else those of the data set. Raises UserError if they are unusable."""
        words = {**self.words, **(config.label_words or {})}
        used = label_words(self.labels, config.model_copy(update={"label_words": words}))
        return Wording(used, config.chat == "plain", config.chat_system == "merge")

    def read_rows(self, rows: Rows, wording: Wording, answered: bool = True) -> Iterator[list[Example]]:
        """The examples of every row, read lazily. Raises UserError for a malformed row.

        Args:
            answered: whether rows say the right choice (`Row.answered`).
        """
        for index in range(len(rows)):
            found = self.examples(Row(rows, index, answered), wording)
            yield [replace(example, origin=rows.at(index)) for example in found]
