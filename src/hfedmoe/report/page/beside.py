"""Several runs beside each other: what they reached, and in which settings they differ."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hfedmoe.report.page.story import Point, Story
from hfedmoe.report.page.tables import Cell, Column, Table, count, duration, number, share, size, table, words
from hfedmoe.report.words import interval_words, machine_words, points

Run = tuple[str, Story]


def reached(stories: Sequence[Story], names: Sequence[str]) -> Table:
    """One row per run: what it is, what it reached and what that took."""
    return table(
        list(zip(names, stories, strict=True)),
        [
            Column("run", lambda run: Cell(run[0])),
            Column("method", lambda run: Cell(run[1].config.method.name)),
            Column("clients", lambda run: count(len(run[1].clients))),
            Column("rounds", lambda run: count(run[1].points[-1].round)),
            Column("accuracy before", lambda run: share(_figure(run[1].before, "accuracy"))),
            Column("accuracy", lambda run: share(_figure(run[1].after, "accuracy"))),
            Column("95 %", lambda run: _interval(run[1].after)),
            Column("macro-F1", lambda run: number(_figure(run[1].after, "macro_f1"))),
            Column("loss", lambda run: number(_figure(run[1].after, "loss"))),
            Column("sites gained", _gained),
            Column("sent", lambda run: size(run[1].points[-1].bytes)),
            Column("time", lambda run: duration(run[1].points[-1].seconds)),
        ],
    )


def differing(stories: Sequence[Story], names: Sequence[str]) -> Table:
    """One row per setting that is not the same in all runs, with a column for each run; the machine counts as one."""
    settings = [
        dict(_flat(story.config.model_dump(mode="json"))) | {"machine": machine_words(story.about.machine)}
        for story in stories
    ]
    known = dict.fromkeys(key for one in settings for key in one)
    keys = [key for key in known if any(one.get(key) != settings[0].get(key) for one in settings)]
    return table(keys, [Column("setting", Cell), *map(_setting, names, settings)])


def _figure(point: Point | None, name: str) -> float | None:
    return None if point is None or point.all is None else point.all.get(name)


def _interval(point: Point | None) -> Cell:
    found = None if point is None else point.interval("all")
    return Cell() if found is None else Cell(interval_words(found), found[0])


def _gained(run: Run) -> Cell:
    """The mean over sites of what each gained, in points."""
    known = [site.gain for site in run[1].sites if site.gain is not None]
    if not known:
        return Cell()
    mean = math.fsum(known) / len(known)
    than = "alone" if any(site.alone is not None for site in run[1].sites) else "before"
    return Cell(f"{points(mean)} on {than}", mean)


def _flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _setting(name: str, settings: Mapping[str, Any]) -> Column[str]:
    return Column(name, lambda key: words(_shown(settings.get(key))))


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
