"""Figures of a comparison: accuracy over rounds, bytes and FLOPs, and against settings that vary."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

from hfedmoe.compare.cells import Result, Round
from hfedmoe.compare.heatmap import expert_maps
from hfedmoe.compare.merits import final, interval
from hfedmoe.compare.stored import Block

AXES: dict[str, tuple[str, Callable[[Round], float]]] = {
    "rounds": ("round", lambda line: 1),
    "bytes": ("MB sent, both ways, all clients", lambda line: (line.bytes_up + line.bytes_down) / 1e6),
    "flops": ("estimated FLOPs, all clients", lambda line: line.flops),
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
"""Okabe and Ito's, which people who do not see all colours can tell apart; dashes tell the rest."""
DASHES = ("-", "--", ":", "-.")
ACROSS = 3
"""Panels beside each other."""

Line = tuple[list[float], list[float], list[float]]
"""x, y and half of the interval of y."""


def draw(blocks: Sequence[Block], out: Path, on: str = "test") -> str:
    """Write all figures, if matplotlib is installed; returns one line that says what was written.

    Args:
        on: "test" or "validation": the rows of the accuracies, for the axes.
    """
    try:
        import matplotlib
    except ImportError:
        return f'{out}: table.md and table.csv; figures need matplotlib: pip install "hfedmoe[figures]"'
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "hfedmoe"  # the same figures have the same bytes
    from matplotlib import pyplot

    figures: dict[str, Any] = {}
    methods = list(dict.fromkeys(result.method for block in blocks for result in block.results))
    for name, (title, cost) in AXES.items():
        curves = {block.point.label: _curves(block.results, cost) for block in blocks}
        figures[f"accuracy-over-{name}.svg"] = _lines(curves, methods, title, on)
    for key in dict.fromkeys(key for block in blocks for key in block.point.settings):
        panels = against(blocks, key)
        if panels:
            figures[f"accuracy-against-{key.replace('.', '-')}.svg"] = _lines(panels, methods, key, on)
    for number, block in enumerate(blocks, 1):
        found = expert_maps(block.results, block.point.label)
        if found is not None:
            figures[f"experts{f'-{number}' if len(blocks) > 1 else ''}.svg"] = found
    for name, figure in figures.items():
        figure.savefig(out / name, metadata={"Date": None})
        pyplot.close(figure)
    return f"{out}: table.md, table.csv, {', '.join(figures)}"


def _curves(results: Sequence[Result], cost: Callable[[Round], float]) -> dict[str, Line]:
    methods = dict.fromkeys(result.method for result in results)
    return {name: curve([result for result in results if result.method == name], cost) for name in methods}


def curve(results: Sequence[Result], cost: Callable[[Round], float]) -> Line:
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


def against(blocks: Sequence[Block], key: str) -> dict[str, dict[str, Line]]:
    """Final accuracy over a setting that varies: a panel for each combination of the others, a line for each method.

    Empty unless the setting has two values or more that are numbers (`grid.number_of`).
    """
    panels: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    numbers = [block.point.number(key) for block in blocks]
    if None in numbers or len(set(numbers)) < 2:
        return {}
    for number, block in zip(numbers, blocks, strict=True):
        rest = ", ".join(f"{name} = {value}" for name, value in block.point.settings.items() if name != key)
        for method in dict.fromkeys(result.method for result in block.results):
            own = [final(result) for result in block.results if result.method == method]
            found = interval([value for value in own if value is not None])
            if found is not None and number is not None:
                entry = (number, found.mean, found.half or 0.0)
                panels.setdefault(rest, {}).setdefault(method, []).append(entry)
    return {
        rest: {method: _columns(sorted(entries)) for method, entries in lines.items()} for rest, lines in panels.items()
    }


def _columns(entries: list[tuple[float, float, float]]) -> Line:
    x, y, half = ([entry[place] for entry in entries] for place in range(3))
    return x, y, half


def _lines(panels: dict[str, dict[str, Line]], methods: list[str], title: str, on: str) -> Any:
    """A figure with a panel for each title; a method has the same colour and dashes in all."""
    from matplotlib import pyplot

    across = min(ACROSS, len(panels))
    down = math.ceil(len(panels) / across)
    size = (7, 4.5) if len(panels) == 1 else (4.5 * across, 3.4 * down)
    figure, grid = pyplot.subplots(down, across, figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (label, lines) in zip(grid.flat, panels.items(), strict=False):
        for method, (x, y, half) in lines.items():
            number = methods.index(method)
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number // len(COLOURS) % len(DASHES)]}
            axes.plot(x, y, label=method, marker="o", markersize=3, **style)
            low, high = ([value + sign * h for value, h in zip(y, half, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, alpha=0.12, color=style["color"], linewidth=0)
        axes.set_title(label, fontsize="small")
        axes.set_xlabel(title)
        axes.grid(alpha=0.3)
    for axes in grid[:, 0]:
        axes.set_ylabel(f"accuracy on {on} rows")
    grid.flat[0].legend(fontsize="small")
    return figure
