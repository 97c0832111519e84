"""Labels of classification: as written in rows, and the words that the model predicts for them."""

from collections.abc import Sequence
from typing import Any

from hfedmoe.config import DataConfig
from hfedmoe.data.normal import key_of, normal
from hfedmoe.data.rows import Rows, text_of
from hfedmoe.errors import UserError


def labels_of(rows: Rows, config: DataConfig) -> list[str]:
    """The label of every row in its normal form (`normal`). Raises UserError for a cell that is not a label."""
    return [_label(cell, rows, i, config.label) for i, cell in enumerate(rows.column(config.label, "data.label"))]


def label_words(labels: Sequence[str], config: DataConfig) -> tuple[str, ...]:
    """The word that the model predicts for each label, in the order of `labels`: `data.label_words`, or the label.

    Raises:
        UserError: `data.label_words` names a label that does not occur, has an empty word, or two labels share one.
    """
    chosen = {normal(label): word for label, word in (config.label_words or {}).items()}
    for label, word in chosen.items():
        if label not in labels:
            raise UserError(f'data.label_words: no row has the label "{label}"; labels: {", ".join(labels)}')
        if not word.strip():
            raise UserError(f'data.label_words: the word for "{label}" is empty')
    words = tuple(chosen.get(label, label) for label in labels)
    for i, word in enumerate(words):
        if word in words[:i]:
            first = labels[words.index(word)]
            raise UserError(f'data.label_words: "{first}" and "{labels[i]}" share the word "{word}"; give each its own')
    return words


def _label(cell: Any, rows: Rows, index: int, column: str) -> str:
    named = isinstance(cell, bool | int) or (isinstance(cell, float) and cell.is_integer())
    label = key_of(cell if named else text_of(cell, rows, index, column))
    if not label:
        raise UserError(f'{rows.at(index)}: column "{column}" has no visible characters; fill it in or remove the row')
    return label
