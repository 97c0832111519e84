"""The table of what each site gained, on rows that it kept back."""

from collections.abc import Callable, Sequence

from hfedmoe.events import Score, SiteGain, Tuning
from hfedmoe.report.page.tables import Cell, Column, Table, count, table
from hfedmoe.report.words import decimal, interval_words, percent, points


def gains(sites: Sequence[SiteGain]) -> Table:
    """One row per site."""
    return table(
        sites,
        [
            Column("site", lambda site: Cell(site.name)),
            Column("trained on", lambda site: count(site.trained_rows)),
            Column("kept back", lambda site: count(site.own_rows)),
            Column("classes", _classes),
            Column("before", lambda site: _scored(site.before)),
            Column("alone", lambda site: _scored(site.alone)),
            Column("federated", lambda site: _scored(site.federated)),
            Column("own", lambda site: _scored(site.own)),
            Column("95 %", lambda site: _interval(site.reached)),
            Column("gain (95 %)", _gained),
            Column("before tuning", _tuned(lambda tuning: _scored(tuning.before))),
            Column("tuned", _tuned(lambda tuning: _scored(tuning.after))),
            Column("tuning gains (95 %)", _tuned(_gained)),
        ],
    )


def _classes(site: SiteGain) -> Cell:
    return Cell(f"{len(site.labels)} of {site.num_labels}", len(site.labels)) if site.num_labels else Cell()


def _scored(score: Score | None) -> Cell:
    """Accuracy and macro-F1; the loss for tasks without choices."""
    if score is None:
        return Cell()
    if score.accuracy is None:
        return Cell(f"loss {decimal(score.loss)}", score.loss)
    f1 = "" if score.macro_f1 is None else f", F1 {score.macro_f1:.2f}"
    return Cell(percent(score.accuracy) + f1, score.accuracy)


def _interval(score: Score) -> Cell:
    if score.interval is None:
        return Cell()
    return Cell(interval_words(score.interval), score.interval[0])


def _gained(by: SiteGain | Tuning) -> Cell:
    if by.gain is None:
        return Cell()
    if by.gain_interval is None:
        return Cell(points(by.gain), by.gain)
    low, high = by.gain_interval
    style = "good" if low > 0 else "bad" if high < 0 else ""
    return Cell(f"{points(by.gain)} ({points(low)} to {points(high)})", by.gain, style)


def _tuned(cell: Callable[[Tuning], Cell]) -> Callable[[SiteGain], Cell]:
    return lambda site: Cell() if site.tuning is None else cell(site.tuning)
