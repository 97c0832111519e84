"""A task: training and held-out examples, from whatever source the configuration names."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

from hfedmoe.config import DataConfig, PartitionConfig
from hfedmoe.data import rows as row_readers
from hfedmoe.data.files import Rows
from hfedmoe.data.partition import natural_groups
from hfedmoe.data.rows import Example, classification_examples, kind_of, label_words, labels_of, wanted_columns
from hfedmoe.data.sources import is_file, is_packaged, read
from hfedmoe.errors import UserError

Kind = Literal["classification", "choices", "completion"]
Item = TypeVar("Item")

__all__ = ["Example", "Kind", "Task", "load_task"]


@dataclass
class Task:
    """What is learnt and on which rows.

    `labels` is sorted and only filled for classification, where every example has the words of all labels, in this
    order, as its choices and the label's index as its answer. `parts` are indices into `train`, one list per client,
    where files or natural ids decide who holds what; `part_names` names those clients. Both are None otherwise.
    """

    name: str
    kind: Kind
    template: str
    labels: tuple[str, ...]
    train: list[Example]
    test: list[Example]
    parts: list[list[int]] | None = None
    part_names: list[str] | None = None


def load_task(config: DataConfig, partition: PartitionConfig, seed: int) -> Task:
    """Read, check, hold out, shuffle and cut the rows; the same seed gives the same task on every machine.

    Held-out rows come from `data.test` (a file, or a split of the source), from the test split of packaged data, or
    are drawn: `data.test_share` of the rows, of every client where files or natural ids decide who holds what.

    Raises:
        UserError: a source is missing or malformed, a cell is bad, a label occurs only in the test rows, or there are
            too few rows or labels.
    """
    natural = partition.scheme == "natural" and config.clients is None
    if natural and partition.column is None:
        raise UserError("partition.scheme=natural needs partition.column, the column that names the client")
    wanted = wanted_columns(config, partition.column if natural else None)
    tables = [read(source, wanted, config.split, config.subset) for source in config.clients or [config.source]]
    test_table = _read_test(config, wanted)
    kind = cast(Kind, kind_of(tables[0], config))

    labels: tuple[str, ...] = ()
    if kind == "classification":
        labels = tuple(sorted({label for table in tables for label in labels_of(table, config)}))
        if len(labels) < 2:
            raise UserError(
                f'{tables[0].origin}: every row has the label "{labels[0]}"; classification needs at least two labels'
            )
    words = label_words(labels, config)

    def examples_of(table: Rows) -> list[Example]:
        if kind == "classification":
            return classification_examples(table, config, labels, words)
        return row_readers.READERS[kind](table, config)

    # One group of rows per client where files or natural ids decide, else one group of all rows.
    if natural:
        examples = examples_of(tables[0])
        ids = natural_groups(_client_ids(tables[0], str(partition.column)))
        names, groups = list(ids), [[examples[i] for i in indices] for indices in ids.values()]
        salts = names
    else:
        names, groups = [table.origin for table in tables], [examples_of(table) for table in tables]
        salts = [str(number) for number in range(len(tables))]  # not the path: another machine has another one

    if test_table is not None:
        test = examples_of(test_table)
    else:
        test, groups = _hold_out(groups, salts, config.test_share, seed)
    test = _shuffled(test, f"{seed}/test")[: config.test_rows]

    owned = [(number, example) for number, group in enumerate(groups) for example in group]
    owned = _shuffled(owned, f"{seed}/train")[: config.train_rows]
    task = Task(
        name=config.source if config.clients is None else f"{len(config.clients)} client files",
        kind=kind,
        template=config.template,
        labels=labels,
        train=[example for _, example in owned],
        test=test,
    )
    if natural or config.clients is not None:
        task.part_names = names
        task.parts = [[] for _ in groups]
        for index, (number, _) in enumerate(owned):
            task.parts[number].append(index)
    return task


def load_watched_task(
    config: DataConfig, partition: PartitionConfig, seed: int, watch_rows: int
) -> tuple[Task, list[Example]]:
    """As `load_task`, and the rows that are watched during a run: a fifth of the held-out rows if these are few.

    They are drawn beside `task.test`, never from it: what they decide must not have seen the test.

    Raises:
        UserError: as `load_task`, or no row is left to test on.
    """
    wanted = None if config.test_rows is None else config.test_rows + watch_rows
    task = load_task(config.model_copy(update={"test_rows": wanted}), partition, seed)
    enough = wanted is not None and len(task.test) >= wanted
    watched = watch_rows if enough else min(watch_rows, len(task.test) // 5)
    watch, task.test = task.test[:watched], task.test[watched:]
    if not task.test:
        raise UserError(f"{task.name}: no rows are held out to test on; set data.test, or raise data.test_share")
    return task, watch


def _read_test(config: DataConfig, wanted: set[str]) -> Rows | None:
    """The held-out rows that a file or split provides; None: they are to be drawn from the training rows."""
    if config.test is None:
        return read(config.source, wanted, "test") if config.clients is None and is_packaged(config.source) else None
    if is_file(config.test) or is_packaged(config.test):
        return read(config.test, wanted, "test")
    if config.clients is not None or is_file(config.source):
        raise UserError(
            f"data.test={config.test}: no such file; a split needs a packaged or hub data set as data.source"
        )
    return read(config.source, wanted, config.test, config.subset)


def _client_ids(table: Rows, column: str) -> list[str]:
    ids = table.column(column, "partition.column")
    for index, cell in enumerate(ids):
        if cell is None or not str(cell).strip():
            raise UserError(f'{table.at(index)}: column "{column}" names no client; fill it in or remove the row')
    return [str(cell).strip() for cell in ids]


def _hold_out(
    groups: list[list[Example]], salts: list[str], share: float, seed: int
) -> tuple[list[Example], list[list[Example]]]:
    """Split a share (at least one row, if there are two) off every group: the rows held out, and what is left.

    Every group draws with its own salt, so that another client's rows do not change this client's.
    """
    held: list[Example] = []
    left: list[list[Example]] = []
    for salt, group in zip(salts, groups, strict=True):
        count = min(max(1, round(share * len(group))), len(group) - 1)
        chosen = set(random.Random(f"{seed}/hold out/{salt}").sample(range(len(group)), count))
        held += [example for index, example in enumerate(group) if index in chosen]
        left.append([example for index, example in enumerate(group) if index not in chosen])
    if not held:
        raise UserError("data.test_share: too few rows to hold any out; name held-out rows with data.test")
    return held, left


def _shuffled(items: Sequence[Item], seed: str) -> list[Item]:
    shuffled = list(items)
    random.Random(seed).shuffle(shuffled)
    return shuffled
