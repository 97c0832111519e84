"""What a table says of a method: means over seeds with 95 % intervals, and paired tests against another method."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median, stdev

from hfedmoe.compare.cells import Result, Round


@dataclass(frozen=True)
class Interval:
    """The mean over seeds, and half the width of its 95 % confidence interval (Student's t)."""

    mean: float
    half: float | None
    """None: fewer than two seeds."""
    number: int


def interval(values: Sequence[float]) -> Interval | None:
    """Of one value per seed; None without any."""
    if not values:
        return None
    if len(values) < 2:
        return Interval(values[0], None, 1)
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return Interval(fmean(values), half, len(values))


def final(result: Result) -> float | None:
    """Accuracy after the last round."""
    return result.rounds[-1].accuracy


def best(result: Result) -> float | None:
    """The best accuracy after any round."""
    found = [line.accuracy for line in result.rounds[1:] if line.accuracy is not None]
    return max(found, default=None)


def until(result: Result, target: float, cost: Callable[[Round], float]) -> float | None:
    """What it cost to reach an accuracy for the first time; None: it was not reached."""
    spent = 0.0
    for line in result.rounds[1:]:
        spent += cost(line)
        if line.accuracy is not None and line.accuracy >= target:
            return spent
    return None


def per_round(result: Result) -> float:
    """Bytes of a round, both ways, the mean over the rounds."""
    return fmean(line.bytes_up + line.bytes_down for line in result.rounds[1:])


COLUMNS: dict[str, Callable[[Result, float], float | None]] = {
    "accuracy": lambda result, target: final(result),
    "best accuracy": lambda result, target: best(result),
    "macro-F1": lambda result, target: result.rounds[-1].macro_f1,
    "worst client": lambda result, target: min(result.client_accuracy, default=None),
    "median client": lambda result, target: median(result.client_accuracy) if result.client_accuracy else None,
    "best client": lambda result, target: max(result.client_accuracy, default=None),
    "worst client, own prior": lambda result, target: min(result.client_accuracy_prior, default=None),
    "median client, own prior": lambda result, target: (
        median(result.client_accuracy_prior) if result.client_accuracy_prior else None
    ),
    "rounds to target": lambda result, target: until(result, target, lambda line: 1),
    "bytes to target": lambda result, target: until(result, target, lambda line: line.bytes_up + line.bytes_down),
    "FLOPs to target": lambda result, target: until(result, target, lambda line: line.flops),
    "bytes per round": lambda result, target: per_round(result),
    "peak memory": lambda result, target: float(max(result.client_peak_bytes, default=0)) or None,
    "clients": lambda result, target: fmean(line.clients for line in result.rounds[1:]),
}
"""The columns of the table: what a result has in each, given the target accuracy."""


@dataclass(frozen=True)
class Comparison:
    """A method against the reference, over the seeds that both have."""

    method: str
    difference: Interval
    """Of the final accuracies: method minus reference."""
    p: float | None
    """Two-sided paired t test, corrected for the number of methods (Holm); None: fewer than two seeds, or no spread."""
    mixed: int = 0
    """Pairs whose two results are of different machines, code or base models."""


def compared(results: Sequence[Result], reference: str) -> list[Comparison]:
    """Every other method against the reference, seed by seed.

    Where a method and seed have several results, a pair is made of the first two of one origin (`Result.origin`), or,
    where there are none, of the first of each.
    """
    known: dict[str, dict[int, list[Result]]] = {}
    for result in results:
        if final(result) is not None:
            known.setdefault(result.method, {}).setdefault(result.seed, []).append(result)
    base = known.pop(reference, {})
    found = []
    for name, own in known.items():
        pairs = [_pair(own[seed], base[seed]) for seed in sorted(own.keys() & base.keys())]
        differences = [float(final(one) or 0.0) - float(final(other) or 0.0) for one, other in pairs]
        spread = interval(differences)
        if spread is not None:
            mixed = sum(one.origin != other.origin for one, other in pairs)
            found.append(Comparison(name, spread, _paired_p(differences), mixed))
    return [replace(one, p=p) for one, p in zip(found, holm([one.p for one in found]), strict=True)]


def _pair(own: list[Result], base: list[Result]) -> tuple[Result, Result]:
    both = ((one, other) for one in own for other in base if one.origin == other.origin)
    return next(both, (own[0], base[0]))


def _paired_p(differences: list[float]) -> float | None:
    if len(differences) < 2 or len(set(differences)) < 2:
        return None
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(differences, 0.0).pvalue)


def holm(values: list[float | None]) -> list[float | None]:
    """p values corrected for many comparisons, step by step (Holm, 1979); None stays."""
    order = sorted((value, place) for place, value in enumerate(values) if value is not None)
    corrected: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (value, place) in enumerate(order):
        largest = max(largest, min(1.0, value * (len(order) - rank)))
        corrected[place] = largest
    return corrected
