"""Groups sent rows into runs of neighbours, so that a buffer is read and written in long pieces, not row by row."""

from bisect import bisect_left
from dataclasses import dataclass


@dataclass
class Runs:
    """Which rows of a stretch were sent."""

    places: slice
    """Where they are in the index of all sent rows."""
    lengths: list[int]
    """Rows of each run."""
    cuts: list[int]
    """Rows of each piece: before the first run, the first run, between, the second run, ..., the rest."""

    def __len__(self) -> int:
        return int(self.places.stop - self.places.start)


def runs_of(index: list[int], first: int, number: int) -> Runs:
    """The runs of neighbours among the rows [first, first + number) of an ascending index."""
    own = slice(bisect_left(index, first), bisect_left(index, first + number))
    lengths: list[int] = []
    cuts: list[int] = []
    after = first  # the row after the last run
    for row in index[own]:
        if lengths and row == after:
            lengths[-1] += 1
            cuts[-1] += 1
        else:
            lengths.append(1)
            cuts += [row - after, 1]
        after = row + 1
    return Runs(own, lengths, [*cuts, first + number - after])
