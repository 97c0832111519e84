"""Something to do next. Needs no other package: the doctor says it when packages are missing, too."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """A command, and what it is for."""

    command: str
    what: str
