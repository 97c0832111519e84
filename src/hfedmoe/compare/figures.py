"""Figures of a comparison: accuracy over rounds, bytes and FLOPs, the mean over seeds with its 95 % interval."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

from hfedmoe.compare.cells import Result, Round
from hfedmoe.compare.merits import interval

AXES: dict[str, tuple[str, Callable[[Round], float]]] = {
    "rounds": ("round", lambda line: 1),
    "bytes": ("MB sent, both ways, all clients", lambda line: (line.bytes_up + line.bytes_down) / 1e6),
    "flops": ("estimated FLOPs, all clients", lambda line: line.flops),
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
"""Okabe and Ito's, which people who do not see all colours can tell apart; dashes tell the rest."""
DASHES = ("-", "--", ":", "-.")


def draw(results: list[Result], out: Path) -> str:
    """Write accuracy-over-*.svg, if matplotlib is installed; returns one line that says what was done."""
    try:
        import matplotlib
    except ImportError:
        return f'{out}: table.md and table.csv; figures need matplotlib: pip install "hfedmoe[figures]"'
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "hfedmoe"  # the same figures have the same bytes
    from matplotlib import pyplot

    for name, (title, cost) in AXES.items():
        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        _curves(axes, results, cost)
        axes.set_xlabel(title)
        axes.set_ylabel("accuracy on held-out rows")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        figure.savefig(out / f"accuracy-over-{name}.svg", metadata={"Date": None})
        pyplot.close(figure)
    return f"{out}: table.md, table.csv, {', '.join(f'accuracy-over-{name}.svg' for name in AXES)}"


def _curves(axes: Any, results: list[Result], cost: Callable[[Round], float]) -> None:
    for number, name in enumerate(dict.fromkeys(result.method for result in results)):
        own = [result for result in results if result.method == name]
        x, y, half = curve(own, cost)
        if not x:
            continue
        style = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number // len(COLOURS) % len(DASHES)]}
        axes.plot(x, y, label=name, marker="o", markersize=3, **style)
        low, high = ([value + sign * h for value, h in zip(y, half, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, alpha=0.12, color=style["color"], linewidth=0)


def curve(results: Sequence[Result], cost: Callable[[Round], float]) -> tuple[list[float], list[float], list[float]]:
    """Cost so far, accuracy and half of its interval, after each round that all seeds have measured."""
    spent = [list(accumulate((cost(line) for line in result.rounds[1:]), initial=0.0)) for result in results]
    x, y, half = [], [], []
    for place in range(min(len(result.rounds) for result in results)):
        values = [accuracy for result in results if (accuracy := result.rounds[place].accuracy) is not None]
        if len(values) < len(results):
            continue
        found = interval(values)
        assert found is not None
        x.append(fmean(own[place] for own in spent))
        y.append(found.mean)
        half.append(found.half or 0.0)
    return x, y, half
