"""Split the training rows over clients, with the partitioners of flwr-datasets."""

import contextlib
import io
import random
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

from hfedmoe.config import PartitionConfig
from hfedmoe.data.task import Task
from hfedmoe.errors import UserError

DIRICHLET_SEEDS = 10  # for each seed, the partitioner draws eleven times before it gives up


def partition(task: Task, config: PartitionConfig, num_clients: int, seed: int) -> list[list[int]]:
    """Give every training row to exactly one client.

    Returns:
        For each client the sorted indices into `task.train`, at least `min_rows`. The same seed gives the same split.

    Raises:
        UserError: there are too few rows, the scheme needs labels but the task has none, or the number of client files
            or natural ids is not `num_clients`.
    """
    if task.parts is not None:
        return _check_given(task, config, num_clients)
    rows = len(task.train)
    if num_clients * config.min_rows > rows:
        raise UserError(
            f"{num_clients} clients with partition.min_rows={config.min_rows} need {num_clients * config.min_rows} "
            f"training rows, but there are {rows}; lower partition.min_rows or clients.count, or raise data.train_rows"
        )
    if config.scheme == "natural":
        raise UserError("partition.scheme=natural: the task was loaded without client ids; set partition.column")
    if config.scheme != "iid" and task.kind != "classification" and task.groups is None:
        raise UserError(
            f"partition.scheme={config.scheme} splits by label, and a {task.kind} task has none; name a column to "
            "split by (partition.column), or use partition.scheme=iid, natural with partition.column, or data.clients"
        )
    parts = [sorted(part) for part in SCHEMES[config.scheme](task, config, num_clients, seed)]
    smallest = min(range(num_clients), key=lambda client: len(parts[client]))
    if len(parts[smallest]) < config.min_rows:
        raise UserError(
            f"partition.scheme={config.scheme}: client {smallest} gets {len(parts[smallest])} rows, fewer than "
            f"partition.min_rows={config.min_rows}; lower partition.min_rows or clients.count"
        )
    return parts


def label_counts(task: Task, parts: list[list[int]]) -> list[list[int]]:
    """Rows per label, `[C][labels]`, in the order of `task.labels` (no columns if the task has no labels)."""
    counts = [[0] * len(task.labels) for _ in parts]
    if task.labels:
        for row, part in zip(counts, parts, strict=True):
            for index in part:
                row[task.train[index].answer] += 1
    return counts


def natural_groups(ids: list[str]) -> dict[str, list[int]]:
    """Row indices by client id, ids in sorted order."""
    from flwr_datasets.partitioner import NaturalIdPartitioner

    partitioner = NaturalIdPartitioner("client")
    with contextlib.redirect_stderr(io.StringIO()):  # it draws a progress bar
        parts = _parts(partitioner, {"client": ids}, list(range(len(ids))))
    return {name: parts[number] for number, name in partitioner.partition_id_to_natural_id.items()}


def _iid(task: Task, config: PartitionConfig, num_clients: int, seed: int) -> list[list[int]]:
    """Equal shares of the shuffled rows, like flwr-datasets' IidPartitioner: the first clients get one row more.

    The partitioner itself builds a data set per client, which takes milliseconds each: too slow for ten thousand.
    """
    rows = _shuffled_rows(task, seed)
    share, more = divmod(len(rows), num_clients)
    ends = [share * (client + 1) + min(client + 1, more) for client in range(num_clients)]
    wholes = _conversations(task, rows)
    if wholes is None:
        return [rows[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    parts: list[list[int]] = [[] for _ in range(num_clients)]
    for whole in wholes:  # to the client with the fewest rows so far
        min(parts, key=len).extend(whole)
    return parts


def _conversations(task: Task, rows: list[int]) -> list[list[int]] | None:
    """The examples of each conversation, in order of first appearance; None: no conversation has several.

    The examples of one conversation must stay with one client, because they contain each other's answers as context.
    """
    wholes: dict[str, list[int]] = {}
    for row in rows:
        wholes.setdefault(task.train[row].origin or f"row {row}", []).append(row)
    if task.kind != "completion" or len(wholes) == len(rows):
        return None
    return list(wholes.values())


def _shards(task: Task, config: PartitionConfig, num_clients: int, seed: int) -> list[list[int]]:
    """Rows sorted by label, cut into equal shards, `shards_per_client` to each client (McMahan et al., 2017)."""
    from flwr_datasets.partitioner import ShardPartitioner

    shards = num_clients * config.shards_per_client
    if shards > len(task.train):
        raise UserError(
            f"{num_clients} clients with partition.shards_per_client={config.shards_per_client} need {shards} training "
            f"rows, but there are {len(task.train)}; lower partition.shards_per_client or clients.count"
        )
    rows = _shuffled_rows(task, seed)
    partitioner = ShardPartitioner(
        num_clients, partition_by="label", num_shards_per_partition=config.shards_per_client, seed=seed
    )
    kinds = _kinds(task)
    parts = _parts(partitioner, {"label": [kinds[row] for row in rows]}, rows)
    # The partitioner drops the rows left over after the last full shard: each goes to the client that already has
    # most rows of its label.
    counts = [Counter(kinds[row] for row in part) for part in parts]
    most = {kind: max(range(num_clients), key=lambda client: counts[client][kind]) for kind in sorted(set(kinds))}
    for row in sorted(set(rows) - {row for part in parts for row in part}):
        parts[most[kinds[row]]].append(row)
    return parts


def _dirichlet(task: Task, config: PartitionConfig, num_clients: int, seed: int) -> list[list[int]]:
    """Shares of every label from a Dirichlet distribution, redrawn until every client has `min_rows`."""
    from flwr_datasets.partitioner import DirichletPartitioner

    rows = _shuffled_rows(task, seed)
    kinds = _kinds(task)
    labels = [kinds[row] for row in rows]
    draws = random.Random(f"{seed}/dirichlet")
    for _ in range(DIRICHLET_SEEDS):
        partitioner = DirichletPartitioner(
            num_clients,
            partition_by="label",
            alpha=config.alpha,
            min_partition_size=config.min_rows,
            seed=draws.getrandbits(31),
        )
        with contextlib.suppress(ValueError):  # "max number of attempts was reached"
            return _parts(partitioner, {"label": labels}, rows)
    raise UserError(
        f"partition.alpha={config.alpha}: no draw gave all {num_clients} clients partition.min_rows={config.min_rows} "
        f"of {len(rows)} rows; raise partition.alpha, or lower partition.min_rows or clients.count"
    )


def _kinds(task: Task) -> list[int]:
    """What rows are split by: the number of each training row's label or, if a column is named, of its group."""
    if task.groups is None:
        return [example.answer for example in task.train]
    numbers = {group: number for number, group in enumerate(sorted(set(task.groups)))}
    return [numbers[group] for group in task.groups]


SCHEMES: dict[str, Callable[[Task, PartitionConfig, int, int], list[list[int]]]] = {
    "dirichlet": _dirichlet,
    "iid": _iid,
    "shards": _shards,
}


def _parts(partitioner: Any, columns: dict[str, list[Any]], rows: list[int]) -> list[list[int]]:
    """The row numbers of each partition that a partitioner makes by the values in `columns`."""
    import datasets

    partitioner.dataset = datasets.Dataset.from_dict({"row": rows, **columns})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one for every rejected draw; pyarrow's deprecations
        count = partitioner.num_partitions  # this access makes the partitions
        indices = getattr(partitioner, "_partition_id_to_indices", None)
        if indices is None or any(number not in indices for number in range(count)):
            return [list(partitioner.load_partition(number)["row"]) for number in range(count)]
        # load_partition would select these rows from the data set, which takes milliseconds per client.
        order = list(partitioner.dataset["row"])
        return [[order[index] for index in indices[number]] for number in range(count)]


def _shuffled_rows(task: Task, seed: int) -> list[int]:
    rows = list(range(len(task.train)))
    random.Random(f"{seed}/partition").shuffle(rows)
    return rows


def _check_given(task: Task, config: PartitionConfig, num_clients: int) -> list[list[int]]:
    """The parts given by files or natural ids. Raises UserError if they do not fit the configuration."""
    assert task.parts is not None
    if len(task.parts) != num_clients:
        raise UserError(
            f"the data has {len(task.parts)} clients, but clients.count is {num_clients}; "
            f"set clients.count={len(task.parts)}"
        )
    for number, part in enumerate(task.parts):
        if len(part) < config.min_rows:
            name = task.part_names[number] if task.part_names else str(number)
            raise UserError(
                f"client {name} has {len(part)} training rows, fewer than partition.min_rows={config.min_rows}; "
                "lower partition.min_rows, raise data.train_rows or give the client more rows"
            )
    return [list(part) for part in task.parts]
