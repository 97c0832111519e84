"""Numbers for a first run: how long prompts may be, how many clients, rounds and steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

BATCH = 8
PASSES = 3
"""How often a client's rows are seen in the whole run, about."""
STEPS = (20, 200)
"""Fewest and most steps of a client in the whole run."""
ROWS_PER_CLIENT, CLIENTS = 100, (2, 8)
MANY_ROWS = 1000
MANY_CLIENTS = 20
MIN_ROWS = 16
"""The default of `partition.min_rows`."""
LONGEST = {"classification": 128, "choices": 512, "completion": 512}
"""Most tokens of a first run, by kind of task; the beginning of a text is often enough to name it."""
SHORTEST = 16


@dataclass(frozen=True)
class Lengths:
    """Lengths of the prompts and answers of training, in tokens."""

    half: int
    """Half of them have at most this many."""
    most: int
    """95 of 100 have at most this many."""
    max_tokens: int
    """The setting."""


def lengths_of(tokens: Sequence[int], kind: str, at_least: int, positions: int | None) -> Lengths:
    """What `data.max_tokens` should be.

    Args:
        tokens: of each row, the longer one of prompt and answer.
        at_least: tokens of the longest label or choice, which must not be cut.
        positions: of the model; None: no limit.
    """
    ordered = sorted(tokens)
    half, most = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.95))
    room = LONGEST[kind] if positions is None else min(LONGEST[kind], (positions + 1) // 2)
    wanted = max(SHORTEST, 8 * math.ceil(most / 8))
    return Lengths(half, most, max(at_least, min(wanted, room)))


def test_share_for(rows: int) -> float:
    """The share of rows to hold out: more of few, so that the figures mean something."""
    return 0.1 if rows >= MANY_ROWS else 0.2


def clients_for(rows: int) -> int:
    """How many simulated clients share the rows."""
    return min(max(rows // ROWS_PER_CLIENT, CLIENTS[0]), CLIENTS[1])


def least_rows(training_rows: int, clients: int) -> int:
    """`partition.min_rows`: the default, or less if there are few rows."""
    return max(1, min(MIN_ROWS, training_rows // (2 * clients)))


def rounds_and_steps(rows_per_client: float) -> tuple[int, int]:
    """Rounds, and the steps of each client in one."""
    total = min(max(math.ceil(PASSES * rows_per_client / BATCH), STEPS[0]), STEPS[1])
    rounds = 5 if total < 60 else 10
    return rounds, math.ceil(total / rounds)
