"""Make examples of rows of the three plain kinds; every cell is checked, and errors name file and line."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from hfedmoe.config import DataConfig
from hfedmoe.data.answers import answer_indices
from hfedmoe.data.example import Example
from hfedmoe.data.labels import labels_of
from hfedmoe.data.normal import among
from hfedmoe.data.rows import Rows, half_character, short, text_of
from hfedmoe.errors import UserError


def classification_examples(
    rows: Rows, config: DataConfig, labels: Sequence[str], words: tuple[str, ...]
) -> list[Example]:
    """Rows of text and label. Raises UserError for a label that is not in `labels`: declared, or of training rows."""
    index = {label: i for i, label in enumerate(labels)}
    texts = texts_of(rows, config)
    examples = []
    for i, label in enumerate(labels_of(rows, config)):
        own = among(label, index)
        if own is None:
            reason = "is in no training row; training labels:" if config.labels is None else "is not in data.labels:"
            raise UserError(f'{rows.at(i)}: the label "{label}" {reason} {", ".join(labels)}')
        examples.append(Example(texts[i], words, index[own], origin=rows.at(i)))
    return examples


def choice_examples(rows: Rows, config: DataConfig, answered: bool = True) -> list[Example]:
    """Rows of prompt, choices and answer; choices are a list, or a JSON list in a text cell.

    Args:
        answered: whether rows have an answer; if not, the first choice stands in for it.
    """
    texts = texts_of(rows, config)
    cells = rows.column(config.choices, "data.choices")
    choices = [_choices(cell, rows, i, config.choices) for i, cell in enumerate(cells)]
    answers = answer_indices(rows, choices, config) if answered else [0] * len(rows)
    return [
        Example(text, options, answer, origin=rows.at(i))
        for i, (text, options, answer) in enumerate(zip(texts, choices, answers, strict=True))
    ]


def completion_examples(rows: Rows, config: DataConfig) -> list[Example]:
    """Rows of prompt and completion; the completion keeps its spaces."""
    texts = texts_of(rows, config)
    cells = rows.column(config.completion, "data.completion")
    return [
        Example(text, completion=text_of(cell, rows, i, config.completion), origin=rows.at(i))
        for i, (text, cell) in enumerate(zip(texts, cells, strict=True))
    ]


READERS: dict[str, Callable[[Rows, DataConfig], list[Example]]] = {
    "choices": choice_examples,
    "completion": completion_examples,
}


def texts_of(rows: Rows, config: DataConfig) -> list[str]:
    """The stripped texts; a table without the default column `text` may call it `prompt`."""
    name = config.text
    if name == "text" and name not in rows.columns and "prompt" in rows.columns:
        name = "prompt"
    return [text_of(cell, rows, i, name).strip() for i, cell in enumerate(rows.column(name, "data.text"))]


def _choices(cell: Any, rows: Rows, index: int, column: str) -> tuple[str, ...]:
    where = f'{rows.at(index)}: column "{column}"'
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except json.JSONDecodeError:
            raise UserError(f'{where} must be a JSON list such as ["yes", "no"], got {short(cell)}') from None
        if half_character(cell):
            raise UserError(f"{where} holds half a character (such as \\ud83d alone); repair or remove the row")
    if not isinstance(cell, list) or not all(isinstance(choice, str) and choice.strip() for choice in cell):
        raise UserError(f"{where} must be a list of non-empty texts, got {short(cell)}")
    if len(cell) < 2:
        raise UserError(f"{where} has {len(cell)} choices; at least two are needed")
    return tuple(choice.strip() for choice in cell)
