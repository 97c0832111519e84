"""What a tracker is told when it begins, or goes on, with a run."""

from dataclasses import dataclass
from typing import Any

Status = str
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"


@dataclass(frozen=True)
class Start:
    """A run, as it is opened in a tracker."""

    key: str
    """By which the tracker finds the run again."""
    project: str
    name: str
    group: str | None
    tags: list[str]
    config: dict[str, Any]
    folder: str | None
    """Of the run."""
    store: str | None
    """Where it writes; None: as the library decides."""
    next_round: int
    """The first round that will be sent; earlier ones are there already."""
