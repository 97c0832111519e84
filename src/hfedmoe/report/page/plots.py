"""The figures of a page, as bokeh draws them: lines, heat maps and bars that can be read in light, dark and print."""

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#F0E442")
"""Okabe and Ito's, which people who do not see all colours can tell apart; dashes tell the rest."""
DASHES = ("solid", "dashed", "dotted", "dotdash")
GREY = "#808080"
"""Of text and lines: it can be read on white and on black."""
HEIGHT = 260
BAND = ("from", "to")
"""Columns of a band."""


@dataclass(frozen=True)
class Plot:
    """A figure and its data."""

    title: str
    figure: Any
    columns: Mapping[str, Sequence[Any]]
    """What it shows, by the names of the columns."""
    note: str = ""
    """How to read it, in a sentence."""
    legend: Sequence[tuple[str, str, str]] = ()
    """Name, colour and style of each line, where there are several: the page writes them, because bokeh's own legend
    takes the room of the lines in a grid."""

    @property
    def csv_link(self) -> str:
        """A link that holds the data, so that nothing is loaded from elsewhere."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(self.columns)
        writer.writerows(zip(*self.columns.values(), strict=True))
        return "data:text/csv;base64," + base64.b64encode(text.getvalue().encode()).decode()

    @property
    def file(self) -> str:
        """The name of its CSV file."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower()) + ".csv"


@dataclass(frozen=True)
class Line:
    """One line of a figure."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    band: Sequence[tuple[float, float]] = ()
    """Where each value may well lie instead, from and to; empty: not known."""
    others: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """What else it can be drawn over, by the name of the axis: the page has a switch for it (`SWITCHED`)."""


SWITCHED = "switched"
"""The tag of figures whose lines can be drawn over something else."""


def lines(
    title: str, across: str, up: str, drawn: Sequence[Line], note: str = "", share: bool = False, whole: bool = False
) -> Plot:
    """Values over something. Points without a value (NaN) are left out.

    Args:
        across, up: what the axes are, with the unit.
        drawn: all with a band, or none; and all with the same others.
        share: values are shares of 1, written as percentages.
        whole: values are numbers of things: 0 and more, without parts.
    """
    from bokeh.models import BasicTicker, ColumnDataSource, HoverTool

    figure = _figure(across, up)
    others = list(drawn[0].others) if drawn else []
    banded = bool(drawn and drawn[0].band)
    columns: dict[str, list[Any]] = {name: [] for name in ("line", across, *others, up, *(BAND if banded else ()))}
    legend = []
    for number, line in enumerate(drawn):
        kept = [index for index, y in enumerate(line.y) if y == y]
        own: dict[str, list[Any]] = {"line": [line.name] * len(kept)}
        for name, values in ((across, line.x), *line.others.items(), (up, line.y)):
            own[name] = [values[index] for index in kept]
        for end, name in enumerate(BAND if banded else ()):
            own[name] = [line.band[index][end] for index in kept]
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
        source = ColumnDataSource(own | {"x": own[across], "y": own[up]})
        if banded:
            figure.varea("x", *BAND, source=source, fill_color=colour, fill_alpha=0.15)
        figure.line("x", "y", source=source, color=colour, line_width=2, line_dash=dash)
        figure.scatter("x", "y", source=source, color=colour, size=6)
        legend.append((line.name, colour, dash if dash in ("solid", "dotted") else "dashed"))
        for name, values in own.items():
            columns[name] += values
    form = "{0.0 %}" if share else "{0.000}"
    tips = [("", "@line"), *((name, f"@{{{name}}}{{0.[0]}}") for name in (across, *others)), (up, f"@y{form}")]
    if banded:
        tips.append(("95 %", " to ".join(f"@{{{name}}}{form}" for name in BAND)))
    figure.add_tools(HoverTool(tooltips=tips))
    figure.tags = [SWITCHED] if others else []
    if whole:
        figure.y_range.start, figure.yaxis[0].ticker = 0, BasicTicker(min_interval=1)
    if share:
        figure.yaxis[0].formatter = _percent()
    return Plot(title, figure, columns, note, legend if len(drawn) > 1 else ())


def heat(
    title: str,
    values: np.ndarray,
    across: Sequence[str],
    up: Sequence[str],
    names: tuple[str, str, str],
    note: str = "",
    share: bool = False,
    top: float | None = None,
) -> Plot:
    """A table of numbers as colours; NaN stays empty.

    Args:
        values: [rows, columns], the first row at the top.
        across, up: what the columns and rows are.
        names: of a column, of a row and of a value.
        share: values are shares of 1, written as percentages.
        top: the value of the brightest colour; None: the largest.
    """
    from bokeh.models import HoverTool, LinearColorMapper
    from bokeh.models.annotations import ColorBar
    from bokeh.palettes import Cividis256

    columns_named, rows_named, value_named = names
    across, up = _distinct(across), _distinct(up)
    figure = _figure(columns_named, rows_named, x_range=list(across), y_range=list(reversed(up)))
    rows, columns = np.nonzero(~np.isnan(values))
    shown = values[rows, columns].astype(np.float32)
    data: dict[str, Any] = {"x": [across[i] for i in columns], "y": [up[i] for i in rows], "value": shown}
    highest = float(shown.max()) if top is None and len(shown) else top
    mapper = LinearColorMapper(palette=Cividis256, low=0.0, high=highest or 1.0)
    figure.rect("x", "y", 1, 1, source=data, fill_color={"field": "value", "transform": mapper}, line_color=None)
    number = "@value{0.0 %}" if share else "@value{0.[000]}"
    figure.add_tools(HoverTool(tooltips=[(columns_named, "@x"), (rows_named, "@y"), (value_named, number)]))
    bar = ColorBar(color_mapper=mapper, width=8, background_fill_alpha=0, major_label_text_color=GREY)
    if share:
        bar.formatter = _percent()
    figure.add_layout(bar, "right")
    figure.grid.visible = False
    for axis, labels in ((figure.xaxis[0], across), (figure.yaxis[0], up)):
        axis.major_tick_line_color = None
        if len(labels) > 24:  # too many to write
            axis.major_label_text_font_size = "0px"
            axis.axis_label = f"{axis.axis_label} ({labels[0]} to {labels[-1]})"
    if max(map(len, across), default=0) > 3:
        figure.xaxis[0].major_label_orientation = 0.8
    figure.height = int(min(600, max(HEIGHT, 90 + 16 * len(up))))
    listed = {columns_named: data["x"], rows_named: data["y"], value_named: [f"{value:.6g}" for value in shown]}
    return Plot(title, figure, listed, note)


def _distinct(labels: Sequence[str]) -> list[str]:
    """The same labels, with a number behind those that occur twice: an axis needs each once.

    Bokeh would load a library from the network for labels that look like formulas, so these no longer do.
    """
    seen: dict[str, int] = {}
    found = []
    for label in (label.replace("$$", "$\u200b$") for label in labels):
        seen[label] = seen.get(label, 0) + 1
        found.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return found


def _percent() -> Any:
    from bokeh.models import NumeralTickFormatter

    return NumeralTickFormatter(format="0 %")


def _figure(across: str, up: str, **ranges: Any) -> Any:
    from bokeh.models import BasicTicker
    from bokeh.plotting import figure

    made = figure(
        height=HEIGHT,
        sizing_mode="stretch_width",
        tools="pan,box_zoom,reset,save",
        toolbar_location="above",
        output_backend="svg",  # sharp in print
        x_axis_label=across,
        y_axis_label=up,
        **ranges,
    )
    if across == "round":
        made.xaxis[0].ticker = BasicTicker(min_interval=1)
    made.background_fill_alpha = made.border_fill_alpha = 0
    made.outline_line_color = None
    made.grid.grid_line_alpha = 0.25
    made.grid.grid_line_color = GREY
    made.toolbar.logo = None
    made.toolbar.autohide = True
    for axis in (*made.xaxis, *made.yaxis):
        axis.axis_label_text_color = axis.major_label_text_color = GREY
        axis.axis_line_color = axis.major_tick_line_color = GREY
        axis.minor_tick_line_color = None
        axis.axis_label_text_font_style = "normal"
    return made
