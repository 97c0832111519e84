"""The first part of a page: did it learn? Figures over rounds, bytes and time, answers before and after."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hfedmoe.report.page.plots import Line, Plot, heat, lines
from hfedmoe.report.page.story import Point, Story

EXAMPLES = 10
KINDS = {"all": "all held-out rows", "watch": "watched rows"}


def curves(stories: Sequence[Story], names: Sequence[str]) -> list[Plot]:
    """Accuracy, macro-F1 and loss after every round, and accuracy over what it costs; one line per run and kind of row.

    Args:
        names: of the runs, for the lines; with one run, lines are named by their rows.
    """
    made = []
    for key, title in (("accuracy", "Accuracy"), ("macro_f1", "Macro-F1"), ("loss", "Loss on the right answers")):
        drawn = _drawn(stories, names, key, lambda point: point.round)
        if drawn:
            made.append(lines(f"{title} over rounds", "round", title.lower(), drawn, share=key == "accuracy"))
    key, title = ("accuracy", "Accuracy") if any(_has(story, "accuracy") for story in stories) else ("loss", "Loss")
    for name, across, cost in (
        ("bytes", "MB sent, both ways, all clients", lambda point: point.bytes / 1e6),
        ("time", "minutes of all rounds", lambda point: point.seconds / 60),
    ):
        drawn = _drawn(stories, names, key, cost)
        if drawn:
            made.append(lines(f"{title} over {name}", across, title.lower(), drawn, share=key == "accuracy"))
    return made


def _has(story: Story, key: str) -> bool:
    return any((found or {}).get(key) is not None for point in story.points for found in (point.all, point.watch))


def _drawn(stories: Sequence[Story], names: Sequence[str], key: str, cost: Callable[[Point], float]) -> list[Line]:
    drawn = []
    for story, name in zip(stories, names, strict=True):
        for kind, rows in KINDS.items():
            points = [point for point in story.points if (getattr(point, kind) or {}).get(key) is not None]
            if points:
                label = rows if len(stories) == 1 else f"{name}, {rows}"
                drawn.append(Line(label, [cost(p) for p in points], [getattr(p, kind)[key] for p in points]))
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
    labels, about = story.about.labels, story.about
    if not labels or not story.answers or not about.texts:
        return []
    (_, before), (_, after) = story.answers[0], story.answers[-1]
    rows = range(min(len(about.texts), len(before), len(after), len(about.truth)))

    def interest(row: int) -> tuple[bool, int]:
        return before[row] == after[row], row

    return [
        {
            "text": about.texts[row],
            "right": labels[about.truth[row]],
            "before": labels[before[row]],
            "after": labels[after[row]],
            "was": before[row] == about.truth[row],
            "is": after[row] == about.truth[row],
        }
        for row in sorted(rows, key=interest)[:EXAMPLES]
    ]


def _ends(found: Sequence[tuple[int, list[int]]]) -> list[tuple[int, list[int]]]:
    return [found[0], found[-1]] if len(found) > 1 else list(found)
