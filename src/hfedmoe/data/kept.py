"""Rows that clients keep back from training, to measure what the federation gave to each."""

import random
from collections.abc import Sequence

from hfedmoe.config import EvaluationConfig
from hfedmoe.data.task import Task

MOST_CLIENTS = 100
"""With more clients nothing is kept back: measuring would take longer than training, and nobody reads the table."""


def keep_back(
    task: Task, parts: Sequence[Sequence[int]], config: EvaluationConfig, seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Split the rows of every client into those that it trains on and those that it keeps back.

    A client with two rows or more keeps at least one back, and trains on at least one. All answers of one conversation
    are on the same side. A client's draw does not depend on the rows of others.

    Args:
        parts: of each client, indices into `task.train`.

    Returns:
        The same indices, sorted: trained on, and kept back.
    """
    if not config.own_share or len(parts) > MOST_CLIENTS:
        return [list(part) for part in parts], [[] for _ in parts]
    trained, kept = [], []
    for client, part in enumerate(parts):
        wholes = _wholes(task, part)
        count = max(0, min(max(1, round(config.own_share * len(wholes))), config.own_rows, len(wholes) - 1))
        chosen = set(random.Random(f"{seed}/own rows/{client}").sample(range(len(wholes)), count))
        trained.append(sorted(row for number, whole in enumerate(wholes) if number not in chosen for row in whole))
        kept.append(sorted(row for number in chosen for row in wholes[number]))
    return trained, kept


def _wholes(task: Task, part: Sequence[int]) -> list[list[int]]:
    """The rows of a client, those of one conversation together."""
    wholes: dict[str, list[int]] = {}
    for row in sorted(part):
        example = task.train[row]
        wholes.setdefault(example.origin if example.messages and example.origin else f"row {row}", []).append(row)
    return list(wholes.values())


def class_counts(task: Task, rows: Sequence[int]) -> dict[str, int]:
    """How many of these training rows have each label that occurs among them; empty for tasks without labels."""
    counts = dict.fromkeys(task.labels, 0)
    if task.labels:
        for row in rows:
            counts[task.labels[task.train[row].answer]] += 1
    return {label: count for label, count in counts.items() if count}
