"""Show a run on a terminal: bars, accuracy and clients, redrawn in place."""

import logging
import sys
from collections.abc import Callable
from typing import IO, Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live as Redrawn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hfedmoe.events import ClientRound, Participant
from hfedmoe.report.live.tracker import ClientLine, Tracker
from hfedmoe.report.personal import personal_line
from hfedmoe.report.words import activation, budget, decimal, human_bytes, human_seconds, joining, percent, steps

Cell = Callable[[ClientLine], str]


def _of_round(show: Callable[[ClientRound], str]) -> Cell:
    return lambda row: "" if row.done is None else show(row.done)


# heading, narrowest console that shows it, text of the cell
COLUMNS: list[tuple[str, int, Cell]] = [
    ("examples", 80, lambda row: str(row.line.examples)),
    ("budget", 60, lambda row: budget(row.line)),
    ("held", 50, _of_round(lambda done: f"{done.resident}/{done.total_experts}")),
    ("trained", 60, _of_round(lambda done: str(done.trained))),
    ("received", 80, _of_round(lambda done: human_bytes(done.bytes_down))),
    ("sent", 80, _of_round(lambda done: human_bytes(done.bytes_up))),
    ("peak", 100, _of_round(lambda done: human_bytes(done.peak_bytes))),
    ("loss", 0, lambda row: "" if row.loss is None else decimal(row.loss)),
]
# the same for columns that are shown only if a client has a deadline
DEADLINE_COLUMNS: list[tuple[str, int, Cell]] = [
    ("steps", 60, _of_round(steps)),
    ("per layer", 100, _of_round(activation)),
]
STYLES = {"waiting": "dim", "training": "cyan", "ok": "green"}
OTHER_LINES = 10  # lines of the screen besides the rows of the table


class OnScreen(Tracker):
    """A screen that another thread draws several times a second; that thread only reads."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        super().__init__(console, clock)
        self._redrawn: Redrawn | None = None
        self._rerouted: list[tuple[logging.StreamHandler, IO[str]]] = []

    def __enter__(self) -> Self:
        streams = (sys.stdout, sys.stderr)
        self._redrawn = Redrawn(get_renderable=self.draw, console=self.console, refresh_per_second=5)
        self._redrawn.start()
        # rich replaces sys.stderr to print above the screen, but a log handler still has the old stream.
        for handler in _stream_handlers():
            if handler.stream in streams:
                self._rerouted.append((handler, handler.stream))
                handler.setStream(sys.stdout if handler.stream is streams[0] else sys.stderr)
        return self

    def __exit__(self, *_: object) -> None:
        for handler, stream in self._rerouted:
            handler.setStream(stream)
        self._rerouted = []
        if self._redrawn is not None:
            self._redrawn.stop()
            self._redrawn = None

    def client_done(self, round: int, client: int, done: ClientRound) -> None:
        super().client_done(round, client, done)
        if done.status not in ("ok", "left"):
            reason = f": {done.reason}" if done.reason else ""
            self.write(f"round {round}, {self.rows[client].line.name}: {done.status}{reason}", "yellow")

    def joined(self, client: int, who: Participant, again: bool) -> None:
        super().joined(client, who, again)
        self.write(joining(who, again))

    def left(self, client: int) -> None:
        super().left(client)
        self.write(f"{self.rows[client].line.name} left")

    def warning(self, text: str) -> None:
        self.write(f"warning: {text}", "yellow")

    def note(self, text: str) -> None:
        self.write(text)

    def finish(self, text: str) -> None:
        self.doing, self.current = "", None
        self.__exit__()
        self.write(text, "bold")

    def draw(self) -> RenderableType:
        """The current screen: bars first, so that a small terminal cuts off clients, not the progress."""
        return Group(self._bars(), *self._scores(), *self._clients())

    def _bars(self) -> RenderableType:
        width = max(5, min(40, self.console.width - 60))
        left, current = self.time_left(), self.current
        grid = Table.grid(padding=(0, 1))
        grid.add_row(
            _cut(self.title, "bold"),
            ProgressBar(max(1, self.num_rounds), self.last_done, width=width),
            _cut(f"round {self.round}/{self.num_rounds}"),
            _cut("" if left is None else f"{human_seconds(left)} left"),
        )
        if self.doing:
            done, total = self.part or (0, 0)
            bar = ProgressBar(max(1, total), done, width=width, pulse=not total, animation_time=self.clock())
            grid.add_row(_cut(self.doing), bar, _cut(f"{done}/{total} rows" if total else ""), "")
        elif current is not None:
            row = self.rows[current]
            bar = ProgressBar(max(1, row.steps), row.step, width=width)
            loss = "" if row.loss is None else f"loss {decimal(row.loss)}"
            grid.add_row(_cut(row.line.name), bar, _cut(f"step {row.step}/{row.steps}"), _cut(loss))
        return grid

    def _scores(self) -> list[RenderableType]:
        """One line for each kind of evaluation, with its first and its latest scores."""
        lines = []
        for kind, name in (("all", "held-out rows"), ("watch", "watched rows")):
            scores = list(self.history[kind])
            if not scores:
                continue
            if scores[-1].accuracy is None:
                steps = [f"round {score.round} loss {decimal(score.trained_loss)}" for score in scores]
            else:
                steps = [f"round {score.round} {percent(score.accuracy)}" for score in scores]
            path = " → ".join(steps[:1] + ["…"] * (len(steps) > 3) + steps[1:][-2:])
            f1 = scores[-1].macro_f1
            lines.append(_cut(f"{name}: {path}" + ("" if f1 is None else f", macro-F1 {decimal(f1)}")))
        own = [_cut(personal_line(self.own))] if self.own else []
        moved = [_cut(f"moved so far: {human_bytes(self.moved_bytes)}")] if self.moved_bytes else []
        return [*lines, *own, *moved]

    def _clients(self) -> list[RenderableType]:
        if not self.rows:
            return []
        deadlines = any(row.done is not None and row.done.deadline_s is not None for row in self.rows)
        known = COLUMNS + (DEADLINE_COLUMNS if deadlines else [])
        columns = [column for column in known if self.console.width >= column[1]]
        table = Table(box=None, header_style="bold", padding=(0, 1))
        table.add_column("client", no_wrap=True, overflow="ellipsis", max_width=max(8, self.console.width // 4))
        for heading, _, _ in columns:
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("status", no_wrap=True)
        room = max(1, self.console.height - OTHER_LINES)
        first = max(0, min((self.current or 0) - room // 2, len(self.rows) - room))  # the busy client is in view
        shown = self.rows[first : first + room]
        for row in shown:
            cells = [Text(show(row)) for _, _, show in columns]
            table.add_row(Text(row.line.name), *cells, Text(row.status, STYLES.get(row.status, "yellow")))
        hidden = len(self.rows) - len(shown)
        return [table, _cut(f" and {hidden} more", "dim")] if hidden else [table]


def _cut(text: str, style: str = "") -> Text:
    """Text that is cut off at the edge instead of running into the next line."""
    return Text(text, style, no_wrap=True, overflow="ellipsis")


def _stream_handlers() -> list[logging.StreamHandler[Any]]:
    known = [entry for entry in logging.root.manager.loggerDict.values() if isinstance(entry, logging.Logger)]
    found = {handler for logger in [logging.root, *known] for handler in logger.handlers}
    return [handler for handler in found if isinstance(handler, logging.StreamHandler)]
