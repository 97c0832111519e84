"""The state of a run, shared by all live views."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hfedmoe.events import ClientRound, ClientTotals, Evaluation, Participant, Personal, SiteGain, Watcher
from hfedmoe.report.live.gains import explained, gains_table
from hfedmoe.report.words import activation, describe, human_bytes, human_seconds, mean_loss, steps

MOST_SHOWN = 50
"""Clients in the final table."""


@dataclass(slots=True)
class ClientLine:
    """One client: its data, its last answer and its current step."""

    line: Participant
    done: ClientRound | None = None
    loss: float | None = None
    """The mean over the steps of its round so far."""
    step: int = 0
    steps: int = 0
    status: str = "waiting"


class Tracker(Watcher):
    """Records every event, and shows only the final table."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self.console = console
        self.clock = clock
        self.title = ""
        self.num_rounds = self.round = self.last_done = 0
        self.rows: list[ClientLine] = []
        self.current: int | None = None  # the client that moved last
        self.doing = ""
        self.part: tuple[int, int] | None = None  # done and total of the current work
        self.history: dict[str, list[Evaluation]] = {"all": [], "watch": []}
        self.own: Sequence[Personal] = ()  # what clients measured last on their own rows
        self.moved_bytes = 0
        self._finished = 0
        self._began: float | None = None  # when the first round of this process began
        self._done_at = 0.0

    def start(
        self,
        title: str,
        num_rounds: int,
        first_round: int,
        clients: Sequence[Participant],
        history: Sequence[Evaluation] = (),
    ) -> None:
        self.title, self.num_rounds = title, num_rounds
        self.round = self.last_done = first_round - 1
        self.rows = [ClientLine(line) for line in clients]
        self.history["all"].extend(history)

    def joined(self, client: int, who: Participant, again: bool) -> None:
        if again:
            self.rows[client].line, self.rows[client].status = who, "waiting"
        else:
            self.rows.append(ClientLine(who))

    def left(self, client: int) -> None:
        self.rows[client].status = "left"

    def phase(self, text: str) -> None:
        self.doing, self.part = text, None

    def round_started(self, round: int) -> None:
        self.round = round
        self._began = self.clock() if self._began is None else self._began
        self.doing, self.current = "", None
        for row in self.rows:
            row.status, row.step, row.steps = "left" if row.status == "left" else "waiting", 0, 0

    def client_started(self, round: int, client: int, steps: int) -> None:
        row = self.rows[client]
        row.step, row.steps, row.status = 0, steps, "training"
        self.doing, self.current = "", client

    def step(self, client: int, step: int, steps: int, loss: float) -> None:
        row = self.rows[client]
        before = 0.0 if row.loss is None or step == 1 else row.loss * (step - 1)
        row.step, row.steps, row.loss, row.status = step, steps, (before + loss) / step, "training"
        self.doing, self.current = "", client

    def client_done(self, round: int, client: int, done: ClientRound) -> None:
        row = self.rows[client]
        row.status = done.status
        if done.status == "ok":
            row.done, row.loss = done, mean_loss(done)
        if self.current == client:
            self.current = None

    def evaluating(self, done: int, total: int) -> None:
        self.doing, self.part = "evaluating", (done, total)

    def evaluated(self, evaluation: Evaluation) -> None:
        self.history[evaluation.kind].append(evaluation)
        self.doing = ""

    def personal(self, round: int, found: Sequence[Personal]) -> None:
        self.own = found

    def round_done(self, round: int, seconds: float, bytes_down: int, bytes_up: int) -> None:
        self.last_done = round
        self.moved_bytes += bytes_down + bytes_up
        self._finished += 1
        self._done_at = self.clock()

    def time_left(self) -> float | None:
        """Seconds left, from the mean time per finished round in this process; None: no round is finished."""
        if not self._finished or self._began is None:
            return None
        per_round = (self._done_at - self._began) / self._finished
        since = self.clock() - self._done_at
        return max(0.0, per_round * (self.num_rounds - self.last_done) - since)

    def final_table(self, clients: Sequence[ClientTotals], before: Evaluation | None, after: Evaluation | None) -> None:
        table = Table(title="What each client held, did and used", title_justify="left", title_style="bold")
        table.add_column("client", overflow="fold")
        shown = clients[:MOST_SHOWN]
        columns = {heading: [show(line) for line in shown] for heading, show in TOTALS.items()}
        columns = {heading: cells for heading, cells in columns.items() if not shown or set(cells) != {"-"}}
        for heading in columns:
            table.add_column(heading, justify="right", overflow="fold")
        for number, line in enumerate(shown):
            table.add_row(escape(line.name), *(cells[number] for cells in columns.values()))
        self.console.print(table)
        if len(clients) > len(shown):
            self.write(f"and {len(clients) - len(shown)} more clients; what each did is in metrics.jsonl")
        for when, score in (("before", before), ("after", after)):
            if score is not None:
                self.write(f"{when:<6} (round {score.round}): {describe(score)} ({score.rows} rows)")

    def site_gains(self, gains: Sequence[SiteGain]) -> None:
        shown = gains[:MOST_SHOWN]
        self.console.print(gains_table(shown))
        if len(gains) > len(shown):
            self.write(f"and {len(gains) - len(shown)} more sites; what each gained is in metrics.jsonl")
        self.write(explained(gains))

    def write(self, line: str, style: str | None = None) -> None:
        """Print one line without markup and wrapping; characters that the console lacks are replaced."""
        encoding = self.console.encoding
        line = line.encode(encoding, "replace").decode(encoding)
        self.console.print(line, style=style, markup=False, highlight=False, emoji=False, soft_wrap=True)


TOTALS: dict[str, Callable[[ClientTotals], str]] = {
    "held": lambda line: f"{line.resident}/{line.total_experts}",
    "trained": lambda line: str(line.trained),
    "received": lambda line: human_bytes(line.bytes_down),
    "sent": lambda line: human_bytes(line.bytes_up),
    "peak (predicted)": lambda line: human_bytes(line.predicted_bytes),
    "peak": lambda line: human_bytes(line.measured_bytes),
    "time": lambda line: human_seconds(line.seconds),
    "deadline": lambda line: "-" if line.deadline_s is None else f"{line.deadline_s:g} s",
    "steps": steps,
    "per layer": activation,
}
"""Columns of the final table; one of which no client has a value is left out."""
