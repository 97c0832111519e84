"""Find the kind of a task from the columns of its table."""

from typing import cast

from hfedmoe.config import DataConfig
from hfedmoe.config.data import Kind
from hfedmoe.data.known import KNOWN, known_set
from hfedmoe.data.rows import Rows
from hfedmoe.errors import UserError

KIND_COLUMNS: dict[Kind, tuple[str, ...]] = {
    "choices": ("choices", "answer"),
    "completion": ("completion",),
    "classification": ("label",),
}
"""Settings that name the columns of each kind, other than the text; a table gets the first kind that it fits."""


def kind_of(rows: Rows, config: DataConfig) -> Kind:
    """The kind of task: `data.format`, or else from the table's columns. Raises UserError if none fits."""
    if config.format != "auto":
        return cast(Kind, config.format)
    named = _named_set(rows)
    has_text = config.text in rows.names or (config.text == "text" and "prompt" in rows.names)
    kind = next((kind for kind in KIND_COLUMNS if has_columns_of(kind, rows, config)), None)
    if kind is not None and (has_text or named is None):
        return kind
    if named is not None:
        raise UserError(f'{rows.origin}: looks like rows of {named}; if so, set data.format = "{named}"')
    raise UserError(
        f'{rows.origin}: no column "{config.label}" (classification), "{config.choices}" with "{config.answer}" '
        f'(choices) or "{config.completion}" (completion); columns present: {", ".join(rows.names) or "none"}; '
        "name yours with data.label, data.choices, data.answer or data.completion"
    )


def settled_kind(config: DataConfig) -> str:
    """The kind of a run's task, from its settings alone: "auto" if only its rows would say."""
    known = known_set(config)
    return config.format if known is None else known.kind


def _named_set(rows: Rows) -> str | None:
    """The name of a known data set whose columns the table has (not of one for classification)."""
    found = [known for known in KNOWN.values() if known.kind != "classification" and known.reads(rows)]
    return found[0].name if found else None


def has_columns_of(kind: Kind, rows: Rows, config: DataConfig) -> bool:
    """Whether a table has the columns of a kind, other than the text."""
    return {getattr(config, column) for column in KIND_COLUMNS[kind]} <= set(rows.names)


def wanted_columns(config: DataConfig, extra: str | None = None) -> set[str]:
    """Every column that a task of any kind could read."""
    named = {config.text, "prompt", config.label, config.choices, config.answer, config.completion}
    return named | ({extra} if extra else set())
