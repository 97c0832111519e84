"""Rows whose labels or right choices are to be predicted: every column is kept, and no answer is looked at."""

from pathlib import Path

from hfedmoe.config import DataConfig
from hfedmoe.data.decoding import Form
from hfedmoe.data.example import Example
from hfedmoe.data.files import read_file
from hfedmoe.data.known import known_set
from hfedmoe.data.labels import label_words
from hfedmoe.data.plain import choice_examples, texts_of
from hfedmoe.data.rows import Rows
from hfedmoe.data.task import Task
from hfedmoe.data.templates import template_of

CAPITAL = "Text"
"""The column of the text in tables of Orange."""


def load_unlabelled(path: Path, config: DataConfig, labels: tuple[str, ...]) -> tuple[Rows, Task]:
    """All columns of a file, and its rows as held-out rows of a task with these labels.

    No row has an answer: the first label stands in for it, so only scores may be read of what is measured on them.

    Raises:
        UserError: the file cannot be read, it has no column with the text, or a text is missing or empty.
    """
    known, rows = known_set(config), _all_columns(path, config)
    if known is not None and config.text not in rows.names and CAPITAL in rows.names:
        config = config.model_copy(update={"text": CAPITAL})
    words = label_words(labels, config) if known is None else known.wording(config).words
    examples = [Example(text, words, 0, origin=rows.at(i)) for i, text in enumerate(texts_of(rows, config))]
    return rows, Task(
        str(path), "classification", template_of(config, known, "classification"), labels, [], test=examples
    )


def load_unanswered(path: Path, config: DataConfig) -> tuple[Rows, Task]:
    """All columns of a file, and its rows as held-out rows of multiple choice, each with choices of its own.

    The first choice stands in for the answer, so only scores may be read of what is measured on them.

    Raises:
        UserError: the file cannot be read, or a row has no text or no choices.
    """
    known, rows = known_set(config), _all_columns(path, config)
    if known is None:
        examples = choice_examples(rows, config, answered=False)
    else:
        read = known.read_rows(rows, known.wording(config), answered=False)
        examples = [example for row in read for example in row]
    return rows, Task(str(path), "choices", template_of(config, known, "choices"), (), [], test=examples)


def _all_columns(path: Path, config: DataConfig) -> Rows:
    form = Form.of(config)
    return read_file(path, read_file(path, (), form).names, form)
