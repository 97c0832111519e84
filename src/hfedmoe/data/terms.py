"""The terms of a run's task, which every device needs to read its own rows as rows of that task.

The server takes them from the rows that it reads. Without them a device would number the labels in its own file, and a
file with other labels or of another kind would train another task under the same name.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any, get_args

from hfedmoe.config import DataConfig
from hfedmoe.config.data import Kind, SetName
from hfedmoe.data.decoding import PLAIN, Form
from hfedmoe.data.example import Example
from hfedmoe.data.kinds import KIND_COLUMNS, has_columns_of, kind_of, wanted_columns
from hfedmoe.data.known import KNOWN, known_set
from hfedmoe.data.labels import label_words, labels_of
from hfedmoe.data.normal import among
from hfedmoe.data.plain import READERS, classification_examples
from hfedmoe.data.rows import Rows
from hfedmoe.data.sources import read
from hfedmoe.data.task import Task
from hfedmoe.data.templates import template_of
from hfedmoe.errors import OwnDataError, UserError
from hfedmoe.files.received import received

READING = (
    *("text", "label", "choices", "answer", "answers", "completion", "label_words", "template"),
    *("chat", "chat_system", "chat_arguments", "max_tokens"),
)
"""Settings of `DataConfig` by which a device reads its own file."""
MOST_LABELS, LONGEST_LABEL = 100_000, 1_000


@dataclass(frozen=True)
class Terms:
    """The terms of a run's task."""

    format: str
    """A kind of task, or the name of a known data set, whose columns every file must have."""
    kind: Kind
    labels: tuple[str, ...] = ()
    """Sorted; empty except for classification."""
    first_token_only: bool = False
    """Whether answers are trained and compared by their first token."""
    chat_date: str | None = None
    """The date that a chat template writes as today's, YYYY-MM-DD; None: it writes no date."""

    def to_json(self) -> str:
        """As JSON text, to be sent."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: object) -> "Terms":
        """The inverse of `to_json`. The text comes from a server; raises ValueError if it is not valid."""
        tree: Any = received(text) if isinstance(text, str) and len(text) < 1 << 24 else None
        if not isinstance(tree, dict) or set(tree) != set(cls.__dataclass_fields__):
            raise ValueError("not the terms of a task")
        labels, kind = tree["labels"], tree["kind"]
        if tree["format"] not in (*get_args(Kind), *get_args(SetName)) or kind not in get_args(Kind):
            raise ValueError("the terms name no known format and kind")
        if not isinstance(labels, list) or len(labels) > MOST_LABELS:
            raise ValueError(f"the labels are not a list of at most {MOST_LABELS}")
        if not all(isinstance(label, str) and 0 < len(label) <= LONGEST_LABEL for label in labels):
            raise ValueError("a label is not a short text")
        if len(set(labels)) != len(labels):
            raise ValueError("a label is given twice")
        day = tree["chat_date"]
        if day is not None and (not isinstance(day, str) or date.fromisoformat(day).isoformat() != day):
            raise ValueError("the date is not valid")
        return cls(tree["format"], kind, tuple(labels), tree["first_token_only"] is True, day)


def terms_of(task: Task, config: DataConfig, first_token_only: bool) -> Terms:
    """The terms of a task that was loaded with this configuration."""
    known = known_set(config)
    return Terms(task.kind if known is None else known.name, task.kind, task.labels, first_token_only, config.chat_date)


def columns_of(config: DataConfig, terms: Terms) -> set[str]:
    """The columns that rows of a task are made of."""
    known = KNOWN.get(terms.format)
    if known is not None:
        return {*known.columns, *known.optional}
    return {config.text, *(getattr(config, column) for column in KIND_COLUMNS[terms.kind])}


def task_key(config: DataConfig, terms: Terms) -> str:
    """A digest of all that decides whether rows are rows of a task, and how they are read.

    It stays the same when a run goes on, whose settings then say what was found in the rows.
    """
    words = config.labels if isinstance(config.labels, dict) else None
    task = {name: getattr(config, name) for name in READING}
    task |= {"words": words, "format": terms.format, "kind": terms.kind, "labels": terms.labels}
    return hashlib.sha256(json.dumps(task, sort_keys=True).encode()).hexdigest()


def own_task(source: str, config: DataConfig, terms: Terms, form: Form = PLAIN) -> Task:
    """Read a device's own file as rows of the run's task; all of them are training rows.

    Args:
        source: the file.
        config: of the run; its columns, words, template and conversation settings are used.
        form: how this file is written; the run's encoding and delimiter are those of the server's file.

    Raises:
        OwnDataError: the file cannot be read, or has rows that do not belong to the task.
    """
    known = KNOWN.get(terms.format)
    own = config.model_copy(update={"format": terms.format, "source": source, "clients": None, "test": None})
    wanted = wanted_columns(own) if known is None else {*known.columns, *known.optional}
    try:
        table = read(source, wanted, own.split or "train", own.subset, own.revision, form)
        if known is not None:
            if not known.reads(table):
                raise UserError(f"{source}: lacks the columns of {known.name}, the data set of the run; add them")
            train = [example for row in known.read_rows(table, known.wording(own)) for example in row]
        else:
            train = _plain_examples(table, own, terms)
    except OwnDataError:
        raise
    except UserError as error:
        raise OwnDataError(str(error)) from None
    if not train:
        raise OwnDataError(f"{source}: no row has an answer to learn; check the file", 0)
    return Task(source, terms.kind, template_of(own, known, terms.kind), terms.labels, train, [])


def _plain_examples(table: Rows, config: DataConfig, terms: Terms) -> list[Example]:
    fits = has_columns_of(terms.kind, table, config)
    kind = terms.kind if fits else kind_of(table, config.model_copy(update={"format": "auto"}))
    if kind != terms.kind:
        raise OwnDataError(
            f"{table.origin}: its columns are those of a {kind} task, but the run is a {terms.kind} task", len(table)
        )
    if terms.kind != "classification":
        return READERS[terms.kind](table, config)
    strangers = [index for index, label in enumerate(labels_of(table, config)) if among(label, terms.labels) is None]
    if strangers:
        raise OwnDataError(
            f'{table.at(strangers[0])}: the label "{labels_of(table, config)[strangers[0]]}" is not among the run\'s '
            f"({', '.join(terms.labels[:20])}); {len(strangers)} rows have such a label"
            f"{_lines(table, strangers)}: correct or remove them",
            len(strangers),
        )
    return classification_examples(table, config, terms.labels, label_words(terms.labels, config))


def _lines(table: Rows, indices: list[int]) -> str:
    """The lines of rows, at most 20 of them; empty where the file has none."""
    if not table.lines or len(indices) < 2:
        return ""
    more = ", ..." if len(indices) > 20 else ""
    return f" (lines {', '.join(str(table.lines[index]) for index in indices[:20])}{more})"
