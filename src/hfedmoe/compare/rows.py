"""Rows of a table: methods, each with settings of its own if the row names some."""

from collections.abc import Sequence
from dataclasses import dataclass

from hfedmoe.config import RunConfig
from hfedmoe.config.reading import config_from_tree
from hfedmoe.errors import UserError
from hfedmoe.method.methods import METHODS


@dataclass(frozen=True)
class Row:
    """A method, and what is different from the configuration in its row alone."""

    method: str
    settings: tuple[str, ...] = ()
    """Such as "method.layers=even"."""

    @property
    def name(self) -> str:
        """As it is written: "hfedmoe" or "hfedmoe@method.layers=even"."""
        return "@".join((self.method, *self.settings))

    def config(self, config: RunConfig) -> RunConfig:
        """The configuration with this method and its settings; options go with the method that it names.

        Raises:
            UserError: a setting is unknown, or has an invalid value.
        """
        options = config.method.options if self.method == config.method.name else {}
        method = config.method.model_copy(update={"name": self.method, "options": options})
        found = config.model_copy(update={"method": method})
        if not self.settings:
            return found
        return config_from_tree(found.model_dump(mode="json"), f"--methods {self.name}", list(self.settings))


def rows_of(text: str) -> list[Row]:
    """The rows of `--methods`: "hfedmoe,hfedmoe@method.layers=even,fedmoe".

    Raises:
        UserError: a method is unknown, or a setting is not of the form section.key=value or belongs to another option.
    """
    rows = [_row(text, entry.strip()) for entry in text.split(",") if entry.strip()]
    if not rows:
        raise UserError(f"--methods {text}: nothing is no method; `hfedmoe methods` lists them")
    return list(dict.fromkeys(rows))


def _row(text: str, entry: str) -> Row:
    method, *settings = (part.strip() for part in entry.split("@"))
    if method not in METHODS:
        raise UserError(f"--methods {text}: {method} is no method; `hfedmoe methods` lists them")
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (equals and value and "." in key):
            raise UserError(
                f"--methods {entry}: expected method@section.key=value, for example hfedmoe@method.layers=even"
            )
        if key.strip() == "method.name":
            raise UserError(f"--methods {entry}: the method stands before the @")
    return Row(method, tuple(settings))


def all_differ(rows: Sequence[Row], config: RunConfig) -> None:
    """Raises UserError if two rows are the same method with the same settings."""
    seen: dict[str, Row] = {}
    for row in rows:
        same = seen.setdefault(row.config(config).model_dump_json(), row)
        if same is not row:
            raise UserError(f"--methods: {row.name} is the same as {same.name}; leave one out")
