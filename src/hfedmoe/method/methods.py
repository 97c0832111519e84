"""A method is four choices: which experts a client holds, by which score, and how experts and gates are averaged.

Every method runs through the same client and server, so a difference in the result is a difference in the method.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Method:
    """One row of the table of methods."""

    name: str
    score: str | None
    """A name of `scores.SCORES`; None: nothing is chosen."""
    residency: Literal["budget", "all"]
    """What a client holds: as many experts as its budget allows, or all."""
    experts: Literal["trained", "holders", "all"]
    """Whose copies of an expert are averaged: of clients that trained it and pass tau (eq. 17), of all that hold it, or
    of every client, stale copies included. It is the `trained` mask of `aggregation.expert_weights`."""
    gate: Literal["importance", "rows", "fedavg"]
    """How gates are averaged (eq. 21)."""


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("hfedmoe", score="ib", residency="budget", experts="trained", gate="importance"),
        Method("fedavg", score=None, residency="all", experts="all", gate="fedavg"),
        Method("random", score="random", residency="budget", experts="holders", gate="fedavg"),
        Method("frequency", score="frequency", residency="budget", experts="holders", gate="fedavg"),
    )
}
