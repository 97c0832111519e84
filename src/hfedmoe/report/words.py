"""Format numbers for people. An unknown number is a dash."""

from collections.abc import Mapping
from typing import Any

from hfedmoe.events import ClientRound, ClientTotals, Evaluation, Participant
from hfedmoe.server.intervals import share_interval


def human_bytes(count: float | None) -> str:
    """Bytes with the largest unit that keeps the number at 1 or more: `512 B`, `1.5 KiB`, `2.0 GiB`."""
    if count is None:
        return "-"
    value, power = float(count), 0
    while value >= 1023.95 and power < 4:  # show 1.0 of the next unit instead of 1024.0
        value, power = value / 1024, power + 1
    return f"{value:.1f} {'KMGT'[power - 1]}iB" if power else f"{count:.0f} B"


def human_seconds(seconds: float | None) -> str:
    """A duration: `0.4 s`, `12 s`, `2:05`, `1:02:05`."""
    if seconds is None:
        return "-"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def percent(share: float | None) -> str:
    """A share in percent, with one decimal."""
    return "-" if share is None else f"{100 * share:.1f} %"


def interval_words(interval: tuple[float, float]) -> str:
    """An interval of a share."""
    low, high = interval
    return f"{100 * low:.0f} to {100 * high:.0f} %"


def decimal(value: float | None) -> str:
    """A loss or an F1."""
    return "-" if value is None else f"{value:.3f}"


def points(share: float | None) -> str:
    """A difference of two shares, in points."""
    return "-" if share is None else f"{100 * share:+.0f}"


def mean_loss(done: ClientRound) -> float | None:
    """A client's loss: the mean over its steps; of an earlier version, the last."""
    return done.last_loss if done.mean_loss is None else done.mean_loss


def peak(done: ClientRound) -> str:
    """A client's memory peak, and whether it was measured."""
    return f"peak {human_bytes(done.peak_bytes)}" + ("" if done.peak_is_measured else " (predicted)")


def budget(line: Participant) -> str:
    """A budget as experts and share."""
    return f"{line.budget} ({100 * line.budget_share:.0f} %)"


def holding(line: Participant) -> str:
    """A client with what it has."""
    return f"{line.name}: {line.examples} examples, budget {budget(line)} experts"


def joining(line: Participant, again: bool) -> str:
    """A client that takes part from now on."""
    return f"{'back: ' if again else 'joined: '}{holding(line)}"


def steps(done: ClientRound | ClientTotals) -> str:
    """Steps done / wanted steps; a dash without a deadline."""
    return "-" if done.deadline_s is None else f"{done.steps}/{done.steps_wanted}"


def activation(done: ClientRound | ClientTotals) -> str:
    """Experts per layer that a step trained / would train without a deadline; a dash without a deadline."""
    if done.deadline_s is None or done.activation is None or done.activation_wanted is None:
        return "-"
    return f"{round(done.activation, 1):g}/{round(done.activation_wanted, 1):g}"


def deadline_cost(done: ClientRound) -> str:
    """A client's round under a deadline: `2 of 3 steps in 4.0 s (deadline 4 s), 3 of 8 experts per layer trained`."""
    return (
        f"{done.steps} of {done.steps_wanted} steps in {human_seconds(done.seconds)} (deadline {done.deadline_s:g} s), "
        f"{activation(done).replace('/', ' of ')} experts per layer trained"
    )


def describe(score: Evaluation) -> str:
    """An evaluation in a few words; figures that the task does not have are left out.

    The watched rows are few, so their accuracy comes with its interval.
    """
    parts = []
    if score.accuracy is not None:
        parts.append(f"accuracy {percent(score.accuracy)}")
        if score.kind == "watch":
            known = share_interval(round(score.accuracy * score.rows), score.rows)
            parts[-1] += f" (95 %: {interval_words(known)})"
    if score.macro_f1 is not None:
        parts.append(f"macro-F1 {decimal(score.macro_f1)}")
    if score.trained_loss is not None:
        parts.append(f"loss {decimal(score.trained_loss)}")
    return ", ".join(parts)


def machine_words(known: Mapping[str, Any]) -> str:
    """The machine of a run (`runs.about`); what a run of an earlier version did not write down is left out."""
    parts = [known.get("processor"), f"{known['threads']} threads" if "threads" in known else None, known.get("device")]
    if "memory_bytes" in known:
        parts.append(f"{human_bytes(known['memory_bytes'])} of memory")
    return ", ".join(part for part in (*parts, known.get("system")) if part)
