"""Rows that clients keep back from training, to measure what the federation gave to each."""

import random
from collections.abc import Sequence

from hfedmoe.config import EvaluationConfig
from hfedmoe.data.task import Task

LEAST = 10
"""Fewest rows that are kept back: fewer say nothing about a model, and too much about the rows."""
FEWEST = 4 * LEAST
"""Fewest rows of a client that keeps any back."""
MOST_CLIENTS = 100
"""With more clients nothing is kept back: measuring would take longer than training, and nobody reads the table."""


def keep_back(
    task: Task, parts: Sequence[Sequence[int]], config: EvaluationConfig, seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Split the rows of every client into those that it trains on and those that it keeps back.

    A client keeps back `LEAST` rows or more, and at most a quarter of its rows; one with too few rows for that keeps
    none back. All answers of one conversation are on the same side and count as one row. A client's draw does not
    depend on the rows of others.

    Args:
        parts: of each client, indices into `task.train`.

    Returns:
        The same indices, sorted: trained on, and kept back.
    """
    split = [kept_by(task, part, client, len(parts), config, seed) for client, part in enumerate(parts)]
    return [trained for trained, _ in split], [kept for _, kept in split]


def kept_by(
    task: Task, part: Sequence[int], client: int, clients: int, config: EvaluationConfig, seed: int
) -> tuple[list[int], list[int]]:
    """As `keep_back`, of one client of so many."""
    if not config.own_share or clients > MOST_CLIENTS:
        return list(part), []
    wholes = _wholes(task, part)
    if len(wholes) < FEWEST:
        return list(part), []
    count = min(max(LEAST, round(config.own_share * len(wholes))), config.own_rows)
    chosen = set(random.Random(f"{seed}/own rows/{client}").sample(range(len(wholes)), count))
    return (
        sorted(row for number, whole in enumerate(wholes) if number not in chosen for row in whole),
        sorted(row for number in chosen for row in wholes[number]),
    )


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
