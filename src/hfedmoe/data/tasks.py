"""Load a task, its training and held-out examples, from the source that the configuration names."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from hfedmoe.config import DataConfig, PartitionConfig
from hfedmoe.data.decoding import Form
from hfedmoe.data.example import Example
from hfedmoe.data.kinds import kind_of, wanted_columns
from hfedmoe.data.known import KNOWN, KnownSet, known_set
from hfedmoe.data.known.known_set import Wording
from hfedmoe.data.labels import declared_labels, label_words, labels_of
from hfedmoe.data.normal import distinct, key_of, shortest
from hfedmoe.data.partition import natural_groups
from hfedmoe.data.plain import READERS, classification_examples
from hfedmoe.data.rows import Rows
from hfedmoe.data.sources import is_file, is_packaged, read
from hfedmoe.data.task import Task
from hfedmoe.data.templates import template_of
from hfedmoe.errors import UserError

Item = TypeVar("Item")


def load_task(config: DataConfig, partition: PartitionConfig, seed: int) -> Task:
    """Read, check, hold out, shuffle and cut the rows; the same seed gives the same task on every machine.

    Held-out rows come from `data.test` (a file, or a split of the source) or from the test split of a known data set.
    Otherwise `data.test_share` of the rows is drawn: from every client, if files or natural ids define the clients.

    Raises:
        UserError: a source is missing or malformed, a cell is bad, a label occurs only in the test rows, or there are
            too few rows or labels.
    """
    natural = partition.scheme == "natural" and config.clients is None
    if natural and partition.column is None:
        raise UserError("partition.scheme=natural needs partition.column, the column that names the client")
    column = partition.column if partition.scheme != "iid" and config.clients is None else None
    known = known_set(config)
    wanted = _wanted(config, known, column)
    tables = [_read_train(source, config, known, wanted) for source in config.clients or [config.source]]
    test_table = _read_test(config, known, wanted)
    kind = kind_of(tables[0], config) if known is None else known.kind

    declared = declared_labels(config, kind, None if known is None else known.name)
    labels: tuple[str, ...] = declared if known is None else known.labels
    if kind == "classification" and not labels:
        labels = _labels(tables, config)
    words = label_words(labels, config) if known is None else ()
    wording = None if known is None else known.wording(config)

    def rows_of(table: Rows) -> list[list[Example]]:
        """The examples of every row: usually one; several for a conversation; a row of a known set may have none."""
        if known is not None and wording is not None:
            return _known_rows(known, table, wording)
        if kind == "classification":
            return [[example] for example in classification_examples(table, config, labels, words)]
        return [[example] for example in READERS[kind](table, config)]

    # One group of rows per client if files or natural ids define the clients, else one group of all rows.
    kinds: dict[int, str] = {}
    if natural:
        rows = rows_of(tables[0])
        ids = natural_groups(_cells_of(tables[0], str(column), "client"))
        names, groups = list(ids), [[rows[i] for i in indices] for indices in ids.values()]
        salts = names
    else:
        names, groups = [table.origin for table in tables], [rows_of(table) for table in tables]
        salts = [str(number) for number in range(len(tables))]  # not the path, which differs between machines
        if column is not None:
            cells = _cells_of(tables[0], column, "group")
            kinds = {id(one): cell for cell, row in zip(cells, groups[0], strict=True) for one in row}

    if test_table is not None:
        test = _shuffled(_flat(rows_of(test_table)), f"{seed}/test")[: config.test_rows]
    else:
        test, groups = _drawn(*_hold_out(groups, salts, config.test_share, seed), config.test_rows, seed)

    owned = [(number, example) for number, group in enumerate(groups) for example in _flat(group)]
    owned = _shuffled(owned, f"{seed}/train")[: config.train_rows]
    task = Task(
        name=config.source if config.clients is None else f"{len(config.clients)} client files",
        kind=kind,
        template=template_of(config, known, kind),
        labels=labels,
        train=[example for _, example in owned],
        test=test,
    )
    if kinds:
        task.groups = [kinds[id(example)] for example in task.train]
    if natural or config.clients is not None:
        task.part_names = names
        task.parts = [[] for _ in groups]
        for index, (number, _) in enumerate(owned):
            task.parts[number].append(index)
    return task


def load_watched_task(
    config: DataConfig, partition: PartitionConfig, seed: int, watch_rows: int
) -> tuple[Task, list[Example]]:
    """Like `load_task`, and also the rows to watch during a run: `watch_rows`, or a fifth of few held-out rows.

    They are never part of `task.test`: nothing decided by them may depend on the test rows.

    Raises:
        UserError: as `load_task`, or no row is left for testing.
    """
    wanted = None if config.test_rows is None else config.test_rows + watch_rows
    task = load_task(config.model_copy(update={"test_rows": wanted}), partition, seed)
    enough = wanted is not None and len(task.test) >= wanted
    watched = watch_rows if enough else min(watch_rows, len(task.test) // 5)
    watch, rest = task.test[:watched], task.test[watched:]
    # Answers of one conversation (they have one origin) are not on both sides.
    begun = {example.origin for example in watch if example.messages}
    task.test = [example for example in rest if not example.messages or example.origin not in begun]
    if not task.test:
        raise UserError(f"{task.name}: no rows are held out for testing; set data.test, or raise data.test_share")
    return task, watch


def load_test(config: DataConfig) -> Task:
    """The rows of a known data set for evaluation, in their own order and without its training rows.

    These are its test split, or all rows of a file if `data.source` is a file and `data.format` names the data set.

    Raises:
        UserError: not a known data set, or the rows are missing or malformed.
    """
    known = known_set(config)
    if known is None:
        name = config.source if config.format == "auto" else config.format
        raise UserError(f"{name}: not a known data set; known: {', '.join(KNOWN)}")
    wanted = _wanted(config, known, None)
    table = _read_test(config, known, wanted) or _read_train(config.source, config, known, wanted)
    test = _flat(_known_rows(known, table, known.wording(config), config.test_rows))[: config.test_rows]
    return Task(known.name, known.kind, template_of(config, known), known.labels, [], test)


def load_rows(config: DataConfig, trained_labels: Callable[[], tuple[str, ...]] | None = None) -> Task:
    """All rows of one source (or the first `data.test_rows`) for evaluation, in their own order.

    Args:
        config: its source is a file, or a folder whose test split is read.
        trained_labels: returns the labels that the model was trained on, if `data.labels` does not say them; None: use
            the labels of these rows.

    Raises:
        UserError: the rows are missing or malformed.
    """
    known = known_set(config)
    if known is not None:
        return load_test(config)
    table = read(config.source, _wanted(config, None, None), config.split or "test", form=Form.of(config))
    kind = kind_of(table, config)
    labels = declared_labels(config, kind)
    if kind == "classification" and not labels:
        labels = _labels([table], config) if trained_labels is None else trained_labels()
    words = label_words(labels, config) if kind == "classification" else ()
    table = table.first(config.test_rows)
    if kind == "classification":
        test = classification_examples(table, config, labels, words)
    else:
        test = READERS[kind](table, config)
    return Task(config.source, kind, template_of(config, None, kind), labels, [], test)


def labels_of_run(config: DataConfig, partition: PartitionConfig, seed: int) -> tuple[str, ...]:
    """The labels of a run, sorted: those of its known data set, those that its config says, else those of its rows.

    Raises:
        UserError: the config does not say them, and the rows cannot be read.
    """
    known = known_set(config)
    if known is not None:
        return known.labels
    return declared_labels(config, "classification") or load_task(config, partition, seed).labels


def _labels(tables: list[Rows], config: DataConfig) -> tuple[str, ...]:
    """All labels, sorted. Raises UserError if there is only one."""
    labels = distinct({label for table in tables for label in labels_of(table, config)})
    if len(labels) < 2:
        if labels == ("-1",):
            raise UserError(
                f"{tables[0].origin}: every label is -1, so these rows have no labels, like a test split with secret "
                "answers; name a split or file with labels (data.split, data.test)"
            )
        raise UserError(
            f'{tables[0].origin}: every row has the label "{labels[0]}"; classification needs at least two labels'
        )
    return labels


def _known_rows(known: KnownSet, table: Rows, wording: Wording, enough: int | None = None) -> list[list[Example]]:
    """The examples of every row; reading stops after `enough` examples, if it is not None.

    Raises:
        UserError: a row is malformed, or no row has an example.
    """

    def needed(rows: Iterator[list[Example]]) -> Iterator[list[Example]]:
        count = 0
        for row in rows:
            yield row
            count += len(row)
            if enough is not None and count >= enough:
                return

    rows = list(needed(known.read_rows(table, wording)))
    if not any(rows):
        raise UserError(f"{table.origin}: all {len(table)} rows are left out, because they have no text or no answer")
    return rows


def _wanted(config: DataConfig, known: KnownSet | None, extra: str | None) -> set[str]:
    if known is None:
        return wanted_columns(config, extra)
    return {*known.columns, *known.optional} | ({extra} if extra else set())


def _read_train(source: str, config: DataConfig, known: KnownSet | None, wanted: set[str]) -> Rows:
    if known is not None and source == known.name:
        return _read_known(known, known.train_split(config), config, wanted)
    return read(source, wanted, config.split or "train", config.subset, config.revision, Form.of(config))


def _read_known(known: KnownSet, split: str, config: DataConfig, wanted: set[str]) -> Rows:
    return read(known.hub or known.name, wanted, split, config.subset or known.subset, config.revision)


def _read_test(config: DataConfig, known: KnownSet | None, wanted: set[str]) -> Rows | None:
    """The held-out rows from a file or split; None: draw them from the training rows."""
    named = known is not None and config.clients is None and config.source == known.name
    if config.test is None:
        if known is not None and named:
            return _read_known(known, known.test, config, wanted)
        return read(config.source, wanted, "test") if config.clients is None and is_packaged(config.source) else None
    if is_file(config.test) or is_packaged(config.test):
        return read(config.test, wanted, "test", form=Form.of(config))
    if config.clients is not None or is_file(config.source):
        raise UserError(
            f"data.test={config.test}: no such file; a split needs a packaged or hub data set as data.source"
        )
    if known is not None and named:
        return _read_known(known, config.test, config, wanted)
    return read(config.source, wanted, config.test, config.subset, config.revision, Form.of(config))


def _cells_of(table: Rows, column: str, what: str) -> list[str]:
    """The cells of `partition.column`, which names a client or a group of rows: `what`, for errors."""
    cells = table.column(column, "partition.column")
    for index, cell in enumerate(cells):
        if cell is None or not key_of(cell):
            raise UserError(f'{table.at(index)}: column "{column}" names no {what}; fill it in or remove the row')
    keys = [key_of(cell) for cell in cells]
    same = shortest(keys)
    return [same[key] for key in keys]


def _hold_out(
    groups: list[list[Item]], salts: list[str], share: float, seed: int
) -> tuple[list[list[Item]], list[list[Item]]]:
    """Hold out a share of every group (at least one row, if it has two); returns held-out and remaining rows by group.

    Each group draws with its own salt, so a client's draw does not depend on the rows of others.
    """
    held: list[list[Item]] = []
    left: list[list[Item]] = []
    for salt, group in zip(salts, groups, strict=True):
        count = min(max(1, round(share * len(group))), len(group) - 1)
        chosen = set(random.Random(f"{seed}/hold out/{salt}").sample(range(len(group)), count))
        held.append([row for index, row in enumerate(group) if index in chosen])
        left.append([row for index, row in enumerate(group) if index not in chosen])
    if not any(held):
        raise UserError("data.test_share: too few rows to hold any out; name held-out rows with data.test")
    return held, left


def _drawn(
    held: list[list[list[Example]]], left: list[list[list[Example]]], number: int | None, seed: int
) -> tuple[list[Example], list[list[list[Example]]]]:
    """At most `number` held-out examples, and the groups; held-out rows that are not used go back to their groups."""
    owned = [(group, row, example) for group, rows in enumerate(held) for row in rows for example in row]
    taken = _shuffled(owned, f"{seed}/test")[:number]
    used = {id(row) for _, row, _ in taken}
    back = [[row for row in rows if id(row) not in used] for rows in held]
    return [example for _, _, example in taken], [rows + more for rows, more in zip(left, back, strict=True)]


def _flat(rows: Iterable[Iterable[Item]]) -> list[Item]:
    return [item for row in rows for item in row]


def _shuffled(items: Sequence[Item], seed: str) -> list[Item]:
    shuffled = list(items)
    random.Random(seed).shuffle(shuffled)
    return shuffled
