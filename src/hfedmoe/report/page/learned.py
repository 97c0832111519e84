"""The first part of a page: did it learn? Figures over rounds, bytes and time, answers before and after."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hfedmoe.report.page.plots import Line, Plot, heat, lines
from hfedmoe.report.page.story import Point, Story

EXAMPLES = 10
KINDS = {"all": "all held-out rows", "watch": "watched rows"}


ACROSS: dict[str, Callable[[Point], float]] = {
    "round": lambda point: point.round,
    "MB sent, both ways, all clients": lambda point: point.bytes / 1e6,
    "minutes of all rounds": lambda point: point.seconds / 60,
}
"""What a figure of the model can be drawn over; the page has a switch."""


def curves(stories: Sequence[Story], names: Sequence[str]) -> list[Plot]:
    """Accuracy, macro-F1 and loss after rounds, over rounds, bytes and time; one line per run and kind of row.

    Args:
        names: of the runs, for the lines; with one run, lines are named by their rows.
    """
    made = []
    for key, title in (("accuracy", "Accuracy"), ("macro_f1", "Macro-F1"), ("loss", "Loss on the right answers")):
        drawn = _drawn(stories, names, key)
        if drawn:
            note = "Around a line: where the accuracy may well lie (95 %), since rows are few." if drawn[0].band else ""
            made.append(
                lines(title, next(iter(ACROSS)), title[0].lower() + title[1:], drawn, note, share=key == "accuracy")
            )
    return made


def _drawn(stories: Sequence[Story], names: Sequence[str], key: str) -> list[Line]:
    drawn = []
    for story, name in zip(stories, names, strict=True):
        for kind, rows in KINDS.items():
            points = [point for point in story.points if (getattr(point, kind) or {}).get(key) is not None]
            if points:
                label = rows if len(stories) == 1 else f"{name}, {rows}"
                (_, first), *others = ((across, [cost(p) for p in points]) for across, cost in ACROSS.items())
                values = [getattr(p, kind)[key] for p in points]
                # With several runs, the bands of all lines would hide each other: the table has the intervals.
                banded = key == "accuracy" and len(stories) == 1
                band = [known for p in points if banded and (known := p.interval(kind)) is not None]
                drawn.append(Line(label, first, values, band, dict(others)))
    return drawn


def confusion(story: Story) -> list[Plot]:
    """Of the first and the last evaluation: which label was answered how often where which was right."""
    labels, truth = story.about.labels, np.array(story.about.truth)
    if not labels or not story.answers:
        return []
    made = []
    for title, (round, predicted) in zip(
        ("Answers before training", "Answers at the end"), _ends(story.answers), strict=False
    ):
        if len(predicted) != len(truth):
            continue
        table = np.zeros((len(labels), len(labels)))
        np.add.at(table, (truth, np.array(predicted)), 1)
        shares = table / np.maximum(1, table.sum(1, keepdims=True))
        shares[table.sum(1) == 0] = np.nan
        note = f"After round {round}. A row is a right label, with how often each was answered; right is the diagonal."
        made.append(heat(title, shares, labels, labels, ("answered", "right", "share of the row"), note, True, 1.0))
    return made


def examples(story: Story) -> list[dict[str, Any]]:
    """Up to ten held-out rows with what was answered before and at the end: those that changed first."""
    about = story.about
    if not story.answers or not about.texts or not (about.labels or about.choices):
        return []
    (_, before), (_, after) = story.answers[0], story.answers[-1]
    rows = range(min(len(about.texts), len(before), len(after), len(about.truth)))

    def interest(row: int) -> tuple[bool, int]:
        return before[row] == after[row], row

    return [
        {
            "text": about.texts[row],
            "right": choices[about.truth[row]],
            "before": choices[before[row]],
            "after": choices[after[row]],
            "was": before[row] == about.truth[row],
            "is": after[row] == about.truth[row],
        }
        for row in sorted(rows, key=interest)[:EXAMPLES]
        for choices in [about.labels or about.choices[row]]
    ]


def _ends(found: Sequence[tuple[int, list[int]]]) -> list[tuple[int, list[int]]]:
    return [found[0], found[-1]] if len(found) > 1 else list(found)
