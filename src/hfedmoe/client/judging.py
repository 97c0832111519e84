"""What a device may say about rows that it kept back from training: counts and means, of enough rows."""

from collections.abc import Sequence
from typing import Protocol

from hfedmoe.data.example import Example
from hfedmoe.events import OwnResult, OwnScore


class Judged(Protocol):
    """How a model does on rows (`server.evaluation.Metrics`)."""

    @property
    def macro_f1(self) -> float | None:
        """None unless the rows have labels."""

    @property
    def trained_loss(self) -> float:
        """Among the choices, if that is what was trained, or else over the vocabulary."""

    @property
    def predicted(self) -> tuple[int, ...] | None:
        """The chosen answer of every row; None without choices."""


def compared(trained: int, rows: Sequence[Example], before: Judged, after: Judged) -> OwnResult:
    """Two measurements of the same rows, as the server may know them.

    Args:
        trained: the number of rows that the device trains on.
    """
    counts: dict[str, int] = {}
    if before.predicted is not None and after.predicted is not None:
        right = [
            (then == row.answer, now == row.answer)
            for row, then, now in zip(rows, before.predicted, after.predicted, strict=True)
        ]
        counts = {
            "right_before": sum(then for then, _ in right),
            "won": sum(now and not then for then, now in right),
            "lost": sum(then and not now for then, now in right),
        }
    return OwnResult(
        trained_rows=trained,
        own_rows=len(rows),
        **counts,
        f1_before=before.macro_f1,
        f1_after=after.macro_f1,
        loss_before=before.trained_loss,
        loss_after=after.trained_loss,
    )


def scored(rows: Sequence[Example], found: Judged) -> OwnScore:
    """One measurement of these rows, as the server may know it."""
    right = None
    if found.predicted is not None:
        right = sum(chosen == row.answer for row, chosen in zip(rows, found.predicted, strict=True))
    return OwnScore(own_rows=len(rows), right=right, loss=found.trained_loss)
