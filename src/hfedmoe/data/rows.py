"""One table's rows turned into examples, every cell checked, errors with file and line."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hfedmoe.config import DataConfig
from hfedmoe.data.answers import answer_indices
from hfedmoe.data.files import Rows, half_character, short, text_of
from hfedmoe.errors import UserError


@dataclass(frozen=True, slots=True)
class Example:
    """One row: a text to prompt with and what should follow it.

    Either one of `choices` (`answer` is its index) or, when there are no choices, `completion`. A conversation has
    `messages` as well, roles and texts up to the answer, which is the completion: the tokenizer's chat template makes
    prompt and answer of them. `origin` names file and line in errors.
    """

    text: str
    choices: tuple[str, ...] = ()
    answer: int = -1
    completion: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    origin: str = field(default="", compare=False, repr=False)

    def __str__(self) -> str:
        return self.origin or f"example {short(self.text)}"


KIND_COLUMNS = {"choices": ("choices", "answer"), "completion": ("completion",), "classification": ("label",)}
"""Settings that name the columns of a kind, beside the text; the first kind whose columns a table has is its own."""


def kind_of(rows: Rows, config: DataConfig) -> str:
    """The kind of task: `data.format`, or by the columns that the table has. Raises UserError if none fits."""
    if config.format != "auto":
        return config.format
    named = _named_set(rows)
    has_text = config.text in rows.names or (config.text == "text" and "prompt" in rows.names)
    kind = next((kind for kind in KIND_COLUMNS if has_columns_of(kind, rows, config)), None)
    if kind is not None and (has_text or named is None):
        return kind
    if named is not None:
        raise UserError(f'{rows.origin}: looks like rows of {named}; say so with data.format = "{named}"')
    raise UserError(
        f'{rows.origin}: no column "{config.label}" (classification), "{config.choices}" with "{config.answer}" '
        f'(choices) or "{config.completion}" (completion); columns present: {", ".join(rows.names) or "none"}; '
        "name yours with data.label, data.choices, data.answer or data.completion"
    )


def _named_set(rows: Rows) -> str | None:
    """A data set with a name that has rows with all these columns, where they are not those of a plain kind."""
    from hfedmoe.data.known import KNOWN  # which is made of what is in here

    found = [known for known in KNOWN.values() if known.kind != "classification" and known.reads(rows)]
    return found[0].name if found else None


def has_columns_of(kind: str, rows: Rows, config: DataConfig) -> bool:
    """Whether a table has the columns that rows of a kind have beside the text."""
    return {getattr(config, column) for column in KIND_COLUMNS[kind]} <= set(rows.names)


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


def classification_examples(
    rows: Rows, config: DataConfig, labels: Sequence[str], words: tuple[str, ...]
) -> list[Example]:
    """Rows of text and label. Raises UserError for a label that is not in `labels` (it is in no training row)."""
    index = {label: i for i, label in enumerate(labels)}
    texts = _texts(rows, config)
    examples = []
    for i, label in enumerate(labels_of(rows, config)):
        if label not in index:
            raise UserError(
                f'{rows.at(i)}: the label "{label}" is in no training row; training labels: {", ".join(labels)}'
            )
        examples.append(Example(texts[i], words, index[label], origin=rows.at(i)))
    return examples


def choice_examples(rows: Rows, config: DataConfig) -> list[Example]:
    """Rows of prompt, choices and answer; choices are a list, or a JSON list in a text cell."""
    texts = _texts(rows, config)
    cells = rows.column(config.choices, "data.choices")
    choices = [_choices(cell, rows, i, config.choices) for i, cell in enumerate(cells)]
    answers = answer_indices(rows, choices, config)
    return [
        Example(text, options, answer, origin=rows.at(i))
        for i, (text, options, answer) in enumerate(zip(texts, choices, answers, strict=True))
    ]


def completion_examples(rows: Rows, config: DataConfig) -> list[Example]:
    """Rows of prompt and completion; the completion is kept as it is, with its spaces."""
    texts = _texts(rows, config)
    cells = rows.column(config.completion, "data.completion")
    return [
        Example(text, completion=text_of(cell, rows, i, config.completion), origin=rows.at(i))
        for i, (text, cell) in enumerate(zip(texts, cells, strict=True))
    ]


READERS: dict[str, Callable[[Rows, DataConfig], list[Example]]] = {
    "choices": choice_examples,
    "completion": completion_examples,
}


def wanted_columns(config: DataConfig, extra: str | None = None) -> set[str]:
    """Every column that a task of any kind could read."""
    named = {config.text, "prompt", config.label, config.choices, config.answer, config.completion}
    return named | ({extra} if extra else set())


def _texts(rows: Rows, config: DataConfig) -> list[str]:
    """The stripped texts; a table without the default column `text` may call it `prompt`."""
    name = config.text
    if name == "text" and name not in rows.columns and "prompt" in rows.columns:
        name = "prompt"
    return [text_of(cell, rows, i, name).strip() for i, cell in enumerate(rows.column(name, "data.text"))]


def _label(cell: Any, rows: Rows, index: int, column: str) -> str:
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, int) or (isinstance(cell, float) and cell.is_integer()):
        return str(int(cell))  # pandas makes 1.0 of 1 where another row has none
    return text_of(cell, rows, index, column).strip()


def _choices(cell: Any, rows: Rows, index: int, column: str) -> tuple[str, ...]:
    where = f'{rows.at(index)}: column "{column}"'
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except json.JSONDecodeError:
            raise UserError(f'{where} must be a JSON list such as ["yes", "no"], got {short(cell)}') from None
        if half_character(cell):
            raise UserError(f"{where} holds half a character (such as \\ud83d by itself); repair or remove the row")
    if not isinstance(cell, list) or not all(isinstance(choice, str) and choice.strip() for choice in cell):
        raise UserError(f"{where} must be a list of non-empty texts, got {short(cell)}")
    if len(cell) < 2:
        raise UserError(f"{where} has {len(cell)} choices; at least two are needed")
    return tuple(choice.strip() for choice in cell)
