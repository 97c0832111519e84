"""What a person sees while a run goes on.

    with Live() as live:
        live.start("r8-hfedmoe", num_rounds=5, first_round=1, clients=[ClientLine("client 0", 210, 14, 0.25)])
        live.round_started(1)
        live.client_started(1, 0, steps=2)
        live.step(0, 1, 2, loss=1.93)
        ...

On a terminal: progress bars, the accuracy so far and a table of the clients, redrawn in place. Anywhere else (a file,
a pipe, TERM=dumb): plain lines, one for every event worth one. A client is named by its position in the list that
`start` was given. Library code that wants no output passes `Silent()`.
"""

import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live as Screen
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

HEARTBEAT_S = 60.0  # without a terminal, a long step shows a sign of life this often


@dataclass(frozen=True)
class ClientLine:
    """A client as it is known before the first round; `budget` counts experts over all layers."""

    name: str
    examples: int
    budget: int
    budget_share: float


@dataclass(frozen=True)
class ClientSummary:
    """What one client did in one round. `status` is "ok", or a word such as "late", which `reason` explains."""

    resident: int = 0
    trained: int = 0
    total_experts: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    loss: float | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    status: str = "ok"
    reason: str = ""


@dataclass(frozen=True)
class Score:
    """One evaluation of the global model; accuracy and macro-F1 are shares, None for tasks without choices."""

    round: int
    accuracy: float | None
    macro_f1: float | None
    loss: float | None
    rows: int


@dataclass(frozen=True)
class FinalLine:
    """What one client held, trained, moved and used over the whole run; `seconds` and bytes moved are sums."""

    name: str
    resident: int
    total_experts: int
    predicted_bytes: int | None
    trained: int
    bytes_down: int
    bytes_up: int
    peak_bytes: int | None
    seconds: float | None


class Watcher(Protocol):
    """The events of a run, in the order in which they come. The default of every event is to do nothing."""

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the terminal as it was found, whatever happened."""

    def start(
        self, title: str, num_rounds: int, first_round: int, clients: Sequence[ClientLine], history: Sequence[Score] = ()
    ) -> None:
        """The run begins or, with `history` and a later `first_round`, goes on."""

    def phase(self, text: str) -> None:
        """Something outside a client's work goes on, such as loading."""

    def round_started(self, round: int) -> None:
        """A round begins."""

    def client_started(self, round: int, client: int, steps: int) -> None:
        """A client begins its local steps."""

    def step(self, client: int, step: int, steps: int, loss: float) -> None:
        """A client has done `step` of `steps`."""

    def client_done(self, round: int, client: int, summary: ClientSummary) -> None:
        """A client has answered, or will not."""

    def evaluating(self, done: int, total: int) -> None:
        """So many of the held-out rows are measured."""

    def evaluated(
        self,
        round: int,
        accuracy: float | None,
        macro_f1: float | None,
        loss: float | None,
        rows: int,
        kind: Literal["all", "watch"] = "all",
    ) -> None:
        """The global model was measured, on all held-out rows or on the few that are watched."""

    def round_done(self, round: int, seconds: float, bytes_down: int, bytes_up: int) -> None:
        """A round is complete; the bytes are those of this round."""

    def warning(self, text: str) -> None:
        """Something the person should know, but that does not stop the run."""

    def finish(self, text: str) -> None:
        """The run is over."""

    def final_table(self, clients: Sequence[FinalLine], before: Score | None, after: Score | None) -> None:
        """What every client held, did and used, and what came of it."""


class Silent(Watcher):
    """Shows nothing."""


@dataclass
class _Row:
    """A client in the table of the terminal."""

    line: ClientLine
    summary: ClientSummary | None = None
    loss: float | None = None
    step: int = 0
    steps: int = 0
    status: str = ""


@dataclass
class _State:
    """Where the run is."""

    title: str = ""
    num_rounds: int = 0
    round: int = 0
    finished: int = 0  # rounds finished since start
    began: float | None = None  # when the first of them began
    round_end: float = 0.0
    rows: list[_Row] = field(default_factory=list)
    current: int | None = None
    phase: str = ""
    phase_done: tuple[int, int] | None = None
    history: dict[str, list[Score]] = field(default_factory=lambda: {"all": [], "watch": []})
    moved: int = 0


class Live(Watcher):
    """Shows the events of a run on a console: a live screen on a terminal, plain lines anywhere else."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        # FORCE_COLOR must not put a live screen into a file: only a real terminal gets one.
        self.console = console or Console(force_terminal=None if sys.stdout.isatty() else False)
        self._on_screen = self.console.is_terminal and not self.console.is_dumb_terminal
        self._on_screen &= self.console.encoding.lower().startswith("utf")
        self._screen: Screen | None = None
        self._clock = clock
        self._state = _State()
        self._last_line = clock()
        self._taken: list[tuple[logging.StreamHandler, Any]] = []

    def __enter__(self) -> "Live":
        if self._on_screen:
            before = (sys.stdout, sys.stderr)
            self._screen = Screen(get_renderable=self._draw, console=self.console, refresh_per_second=5)
            self._screen.start()
            self._taken = _reroute_logging(before)
        return self

    def __exit__(self, *_: object) -> None:
        for handler, stream in self._taken:
            handler.setStream(stream)
        self._taken = []
        if self._screen is not None:
            self._screen.stop()
            self._screen = None

    # events

    def start(
        self, title: str, num_rounds: int, first_round: int, clients: Sequence[ClientLine], history: Sequence[Score] = ()
    ) -> None:
        self._state = _State(title, num_rounds, first_round - 1, rows=[_Row(line) for line in clients])
        self._state.history["all"].extend(history)
        going_on = f" from round {first_round}" if first_round > 1 else ""
        self._say(f"{title}: {num_rounds} rounds{going_on}, {len(clients)} clients")
        for line in clients:
            self._say(f"  {line.name}: {line.examples} examples, budget {line.budget} experts ({_share(line)})")

    def phase(self, text: str) -> None:
        self._set_phase(text)
        self._say(text)

    def round_started(self, round: int) -> None:
        state = self._state
        state.round = round
        state.round_end = self._clock()
        state.began = state.round_end if state.began is None else state.began
        for row in state.rows:
            row.status, row.step, row.steps = "", 0, 0
        self._set_phase("")
        self._say(f"round {round}/{state.num_rounds}")

    def client_started(self, round: int, client: int, steps: int) -> None:
        row = self._state.rows[client]
        row.step, row.steps, row.status = 0, steps, "training"
        self._state.current = client
        self._set_phase("")

    def step(self, client: int, step: int, steps: int, loss: float) -> None:
        row = self._state.rows[client]
        row.step, row.steps, row.loss, row.status = step, steps, loss, "training"
        self._state.current = client
        self._heartbeat(f"  {row.line.name}: step {step}/{steps}, loss {_loss(loss)}")

    def client_done(self, round: int, client: int, summary: ClientSummary) -> None:
        row = self._state.rows[client]
        row.status = summary.status
        if self._state.current == client:
            self._state.current = None
        if summary.status != "ok":
            reason = f": {summary.reason}" if summary.reason else ""
            self._say(f"  {row.line.name}: {summary.status}{reason}")
            self._print(f"[yellow]round {round}, {escape(f'{row.line.name}: {summary.status}{reason}')}")
            return
        row.summary, row.loss = summary, summary.loss
        parts = [
            f"held {summary.resident}/{summary.total_experts} experts",
            f"trained {summary.trained}",
            f"received {human_bytes(summary.bytes_down)}",
            f"sent {human_bytes(summary.bytes_up)}",
            f"loss {_loss(summary.loss)}",
            human_seconds(summary.seconds),
            f"peak {human_bytes(summary.peak_bytes)}",
        ]
        self._say(f"  {row.line.name}: {', '.join(parts)}")

    def evaluating(self, done: int, total: int) -> None:
        self._set_phase("evaluating", (done, total))
        self._heartbeat(f"  evaluating: {done}/{total} rows")

    def evaluated(
        self,
        round: int,
        accuracy: float | None,
        macro_f1: float | None,
        loss: float | None,
        rows: int,
        kind: Literal["all", "watch"] = "all",
    ) -> None:
        score = Score(round, accuracy, macro_f1, loss, rows)
        self._state.history[kind].append(score)
        self._set_phase("")
        which = "watched rows" if kind == "watch" else "held-out rows"
        self._say(f"  after round {round}: {_describe(score)} ({rows} {which})")

    def round_done(self, round: int, seconds: float, bytes_down: int, bytes_up: int) -> None:
        state = self._state
        state.finished += 1
        state.round_end = self._clock()
        state.moved += bytes_down + bytes_up
        moved = f"{human_bytes(bytes_down)} to clients, {human_bytes(bytes_up)} back"
        left = self._time_left()
        self._say(f"round {round}/{state.num_rounds} done in {human_seconds(seconds)}: {moved}{left and ', ' + left}")

    def warning(self, text: str) -> None:
        self._say(f"warning: {text}")
        self._print(f"[yellow]warning:[/] {escape(text)}")

    def finish(self, text: str) -> None:
        self._set_phase("")
        self.__exit__()
        self._say(text)
        self._print(f"[bold]{escape(text)}")

    def final_table(self, clients: Sequence[FinalLine], before: Score | None, after: Score | None) -> None:
        table = Table(title="What each client held, did and used", title_justify="left")
        table.add_column("client", overflow="fold")
        for heading in ("held", "predicted", "trained", "received", "sent", "peak", "time"):
            table.add_column(heading, justify="right", overflow="fold")
        for line in clients:
            table.add_row(
                escape(line.name),
                f"{line.resident}/{line.total_experts}",
                human_bytes(line.predicted_bytes),
                str(line.trained),
                human_bytes(line.bytes_down),
                human_bytes(line.bytes_up),
                human_bytes(line.peak_bytes),
                human_seconds(line.seconds),
            )
        # A file has no width: give the table all it wants there.
        self.console.print(table, width=self.console.width if self._on_screen else max(self.console.width, 120))
        for when, score in (("before", before), ("after", after)):
            if score is not None:
                text = f"{when:<6} (round {score.round}): {_describe(score)}, {score.rows} rows"
                self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    # plain lines

    def _say(self, line: str) -> None:
        if self._on_screen:
            return
        self._last_line = self._clock()
        encoding = self.console.encoding
        line = line.encode(encoding, "replace").decode(encoding)
        self.console.print(line, markup=False, highlight=False, soft_wrap=True, emoji=False)

    def _heartbeat(self, line: str) -> None:
        if self._clock() - self._last_line >= HEARTBEAT_S:
            self._say(line)

    # the screen

    def _print(self, markup: str) -> None:
        """A line that stays above the live screen."""
        if self._on_screen:
            self.console.print(markup, highlight=False, emoji=False)

    def _set_phase(self, text: str, done: tuple[int, int] | None = None) -> None:
        self._state.phase, self._state.phase_done = text, done

    def _time_left(self) -> str:
        """From the finished rounds, with all that lies between them."""
        state = self._state
        if not state.finished or state.began is None:
            return ""
        per_round = (state.round_end - state.began) / max(1, state.finished)
        return f"{human_seconds(per_round * (state.num_rounds - state.round))} left"

    def _draw(self) -> RenderableType:
        """The screen, drawn several times a second from another thread: it only reads."""
        return Group(*[part for part in (self._bars(), self._scores(), self._table()) if part is not None])

    def _bars(self) -> RenderableType:
        state = self._state
        width = max(5, min(40, self.console.width - 60))
        grid = Table.grid(padding=(0, 1))
        done = state.num_rounds if not state.num_rounds else state.round - (0 if self._round_is_over() else 1)
        grid.add_row(
            Text(state.title, style="bold", overflow="ellipsis", no_wrap=True),
            ProgressBar(max(1, state.num_rounds), max(0, done), width=width),
            Text(f"round {max(0, state.round)}/{state.num_rounds}"),
            Text(self._time_left()),
        )
        current = state.current
        if state.phase:
            part, total = state.phase_done or (0, 0)
            bar = ProgressBar(total or None, part, width=width, pulse=not total)
            grid.add_row(Text(state.phase), bar, Text(f"{part}/{total} rows" if total else ""), Text())
        elif current is not None:
            row = state.rows[current]
            bar = ProgressBar(max(1, row.steps), row.step, width=width)
            position = Text(f"step {row.step}/{row.steps}")
            grid.add_row(Text(row.line.name, overflow="ellipsis", no_wrap=True), bar, position, Text(f"loss {_loss(row.loss)}"))
        return grid
