"""One table's rows turned into examples, every cell checked, errors with file and line."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hfedmoe.config import DataConfig
from hfedmoe.data.files import Rows, half_character
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


def kind_of(rows: Rows, config: DataConfig) -> str:
    """The kind of task: `data.format`, or by the columns that the table has. Raises UserError if none fits."""
    if config.format != "auto":
        return config.format
    present = set(rows.names)
    if {config.choices, config.answer} <= present:
        return "choices"
    if config.completion in present:
        return "completion"
    if config.label in present:
        return "classification"
    raise UserError(
        f'{rows.origin}: no column "{config.label}" (classification), "{config.choices}" with "{config.answer}" '
        f'(choices) or "{config.completion}" (completion); columns present: {", ".join(rows.names) or "none"}; '
        "name yours with data.label, data.choices, data.answer or data.completion"
    )


def labels_of(rows: Rows, config: DataConfig) -> list[str]:
    """The label of every row, stripped; whole numbers become text. Raises UserError for null and other types."""
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
    """Rows of prompt, choices and answer.

    Choices are a list, or a JSON list in a text cell. The answer is an index from 0; or text: a choice, else the
    digits of an index, else a letter from A.
    """
    texts = _texts(rows, config)
    choices = rows.column(config.choices, "data.choices")
    answers = rows.column(config.answer, "data.answer")
    examples = []
    for i in range(len(rows)):
        options = _choices(choices[i], rows, i, config.choices)
        answer = _answer(answers[i], options, rows, i, config.answer)
        examples.append(Example(texts[i], options, answer, origin=rows.at(i)))
    return examples


def completion_examples(rows: Rows, config: DataConfig) -> list[Example]:
    """Rows of prompt and completion; the completion is kept as it is, with its spaces."""
    texts = _texts(rows, config)
    cells = rows.column(config.completion, "data.completion")
    return [
        Example(text, completion=_text(cell, rows, i, config.completion), origin=rows.at(i))
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
    return [_text(cell, rows, i, name).strip() for i, cell in enumerate(rows.column(name, "data.text"))]


def _text(cell: Any, rows: Rows, index: int, column: str) -> str:
    if cell is None:
        raise UserError(f'{rows.at(index)}: column "{column}" is missing; fill it in or remove the row')
    if not isinstance(cell, str):
        raise UserError(f'{rows.at(index)}: column "{column}" must be text, got {short(cell)}')
    if not cell.strip():
        raise UserError(f'{rows.at(index)}: column "{column}" is empty; fill it in or remove the row')
    return cell


def _label(cell: Any, rows: Rows, index: int, column: str) -> str:
    if isinstance(cell, int) and not isinstance(cell, bool):
        return str(cell)
    return _text(cell, rows, index, column).strip()


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


def _answer(cell: Any, choices: tuple[str, ...], rows: Rows, index: int, column: str) -> int:
    where = f'{rows.at(index)}: column "{column}"'
    if isinstance(cell, int) and not isinstance(cell, bool):
        if not 0 <= cell < len(choices):
            raise UserError(f"{where} is {cell}, but the {len(choices)} choices are numbered 0 to {len(choices) - 1}")
        return cell
    text = _text(cell, rows, index, column).strip()
    if choices.count(text) > 1:
        raise UserError(f'{where}: the choice "{text}" occurs more than once; give the answer as an index from 0')
    if text in choices:
        return choices.index(text)
    if text.isdecimal():
        return _answer(int(text), choices, rows, index, column)
    letter = ord(text.upper()) - ord("A") if len(text) == 1 else -1
    if not 0 <= letter < len(choices):
        raise UserError(f"{where} is {short(text)}, which is not among the choices {short(list(choices))}")
    return letter


def short(value: Any) -> str:
    """A value for an error message, on one line."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."
