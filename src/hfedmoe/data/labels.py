"""Labels of classification: as written in rows or declared, and the words that the model predicts for them."""

from collections.abc import Sequence
from typing import Any

from hfedmoe.config import DataConfig
from hfedmoe.data.normal import among, distinct, key_of, normal
from hfedmoe.data.rows import Rows, text_of
from hfedmoe.errors import UserError


def labels_of(rows: Rows, config: DataConfig) -> list[str]:
    """The label of every row in its normal form (`normal`). Raises UserError for a cell that is not a label."""
    return [_label(cell, rows, i, config.label) for i, cell in enumerate(rows.column(config.label, "data.label"))]


def declared_labels(config: DataConfig, kind: str = "classification", known: str | None = None) -> tuple[str, ...]:
    """The labels of `data.labels`, sorted; empty: it declares none, and the rows decide.

    Args:
        kind: of the task.
        known: name of the known data set that the rows belong to, which has labels of its own.

    Raises:
        UserError: the task has no labels or its own, a label is empty, or two look the same.
    """
    if config.labels is None:
        return ()
    if known is not None:
        raise UserError(f"data.labels: {known} has its own labels; leave the setting out (data.label_words has words)")
    if kind != "classification":
        raise UserError(f"data.labels: a {kind} task has no labels; leave the setting out")
    written = [normal(label) for label in config.labels]
    for number, label in enumerate(written):
        if not label:
            raise UserError("data.labels: a label has no visible characters; write its name")
        if among(label, written[:number]) is not None:
            raise UserError(f'data.labels: names "{label}" twice; keep one')
    return distinct(written)


def label_words(labels: Sequence[str], config: DataConfig) -> tuple[str, ...]:
    """The word that the model predicts for each label, in the order of `labels`.

    It is in `data.labels` (a table) or in `data.label_words`; else it is the label itself.

    Raises:
        UserError: a word belongs to no label or is empty, or two labels share one.
    """
    declared = isinstance(config.labels, dict)
    key = "data.labels" if declared else "data.label_words"
    given = config.labels if isinstance(config.labels, dict) else config.label_words
    chosen = {normal(label): word for label, word in (given or {}).items()}
    for label, word in chosen.items():
        if label not in labels:
            whose = "no row has" if config.labels is None else "data.labels lacks"
            raise UserError(f'{key}: {whose} the label "{label}"; labels: {", ".join(labels)}')
        if not word.strip():
            raise UserError(f'{key}: the word for "{label}" is empty')
    words = tuple(chosen.get(label, label) for label in labels)
    for i, word in enumerate(words):
        if word in words[:i]:
            first = labels[words.index(word)]
            raise UserError(f'{key}: "{first}" and "{labels[i]}" share the word "{word}"; give each its own')
    return words


def _label(cell: Any, rows: Rows, index: int, column: str) -> str:
    named = isinstance(cell, bool | int) or (isinstance(cell, float) and cell.is_integer())
    label = key_of(cell if named else text_of(cell, rows, index, column))
    if not label:
        raise UserError(f'{rows.at(index)}: column "{column}" has no visible characters; fill it in or remove the row')
    return label
