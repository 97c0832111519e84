"""The table of what each site gained."""

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from hfedmoe.events import Score, SiteGain, Tuning
from hfedmoe.report.words import decimal, percent, points


def gains_table(gains: Sequence[SiteGain]) -> Table:
    """One line per site; columns that no site has are left out, and `own` where all sites know the shared model."""
    alone = any(gain.alone is not None for gain in gains)
    tuned = any(gain.tuning is not None for gain in gains)
    labelled = any(gain.labels for gain in gains)
    choices = any(gain.reached.accuracy is not None for gain in gains)
    models = ["before", *(["alone"] if alone else []), *_reached(gains)]
    table = Table(title="What each site gained", title_justify="left", title_style="bold")
    table.add_column("site", overflow="fold")
    headings = ["trained on", "kept back", *(["classes"] if labelled else []), *models]
    headings += ["95 %", "gain (95 %)"] if choices else []
    headings += ["tuned"] + (["tuning gains (95 %)"] if choices else []) if tuned else []
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    for gain in gains:
        table.add_row(
            escape(gain.name),
            str(gain.trained_rows),
            str(gain.own_rows),
            *([f"{len(gain.labels)} of {gain.num_labels}"] if labelled else []),
            *(_shown(getattr(gain, model)) for model in models),
            *([_between(gain.reached), _gained(gain)] if choices else []),
            *([_tuned(gain.tuning)] + ([_gained(gain.tuning)] if choices else []) if tuned else []),
        )
    return table


def _reached(gains: Sequence[SiteGain]) -> list[str]:
    """The columns of what sites came to: devices that hold some experts know only how good these are."""
    federated = any(gain.federated is not None for gain in gains)
    own = any(gain.federated is None for gain in gains)
    return [name for name, known in (("federated", federated), ("own", own)) if known]


def _shown(score: Score | None) -> str:
    """Accuracy and macro-F1; the loss for tasks without choices."""
    if score is None:
        return "-"
    if score.accuracy is None:
        return decimal(score.loss)
    return percent(score.accuracy) + ("" if score.macro_f1 is None else f", {score.macro_f1:.2f}")


def explained(gains: Sequence[SiteGain]) -> str:
    """What the table's figures are, in one line."""
    than = "alone" if any(gain.alone is not None for gain in gains) else "before"
    choices, f1 = (
        any(getattr(gain.reached, figure) is not None for gain in gains) for figure in ("accuracy", "macro_f1")
    )
    what = "accuracy, macro-F1" if f1 else "accuracy" if choices else "loss"
    text = f"{what} on rows that each site kept back: nobody trained on them, and they decide nothing"
    reached = _reached(gains)
    text += f"; gain: points of accuracy, {' or else '.join(reached)} less {than}." if choices else "."
    if "own" in reached:
        text += " own: the experts that the device holds, which is all that it can measure; before: the same experts."
    if than == "before":
        text += " evaluation.alone = true adds what each would have reached by itself."
    tuned = next((gain.tuning for gain in gains if gain.tuning is not None), None)
    if tuned is not None:
        text += (
            f" tuned: the experts that the site held, as the shared model has them, and after {tuned.steps} steps more "
            "for itself."
        )
    return text


def _between(score: Score) -> str:
    if score.interval is None:
        return "-"
    low, high = score.interval
    return f"{100 * low:.0f} to {100 * high:.0f} %"


def _tuned(tuning: Tuning | None) -> str:
    """From what to what a site came by training further."""
    if tuning is None:
        return "-"
    pair = (tuning.before, tuning.after)
    return " to ".join(decimal(one.loss) if one.accuracy is None else percent(one.accuracy) for one in pair)


def _gained(gain: SiteGain | Tuning | None) -> str:
    if gain is None or gain.gain is None or gain.gain_interval is None:
        return "-"
    low, high = gain.gain_interval
    return f"{points(gain.gain)} ({points(low)} to {points(high)})"
