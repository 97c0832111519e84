"""Labels of classification: as they stand in rows, and the words that the model says for them."""

from collections.abc import Sequence
from typing import Any

from hfedmoe.config import DataConfig
from hfedmoe.data.files import Rows, text_of
from hfedmoe.errors import UserError


def labels_of(rows: Rows, config: DataConfig) -> list[str]:
    """The label of every row, stripped; whole numbers and booleans become text. Raises UserError for what is none."""
    return [_label(cell, rows, i, config.label) for i, cell in enumerate(rows.column(config.label, "data.label"))]


def label_words(labels: Sequence[str], config: DataConfig) -> tuple[str, ...]:
    """What the model says for each label, in the order of `labels`: `data.label_words`, or the label itself.

    Raises:
        UserError: `data.label_words` names a label that does not occur, has an empty word, or two labels share one.
    """
    chosen = config.label_words or {}
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
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, int) or (isinstance(cell, float) and cell.is_integer()):
        return str(int(cell))  # pandas makes 1.0 of 1 where another row has none
    return text_of(cell, rows, index, column).strip()
