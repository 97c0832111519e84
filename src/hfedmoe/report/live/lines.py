"""Show a run as plain lines, for files, pipes and simple terminals."""

from collections.abc import Callable, Sequence

from rich.console import Console

from hfedmoe.events import ClientRound, Evaluation, Participant, Personal
from hfedmoe.report.live.tracker import Tracker
from hfedmoe.report.personal import personal_line
from hfedmoe.report.words import (
    budget,
    deadline_cost,
    decimal,
    describe,
    holding,
    human_bytes,
    human_seconds,
    joining,
    mean_loss,
    peak,
)

HEARTBEAT_S = 60.0  # long work writes a line this often
MANY = 50  # clients; with more, only failed ones have lines of their own


class Lines(Tracker):
    """Writes one line for each important event, without carriage returns and colours."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        super().__init__(console, clock)
        self._last_line = clock()
        self._answered = 0
        if not console.is_terminal:  # a file has no width; rich would fold the final table at 80
            console.width = max(console.width, 120)

    def start(
        self,
        title: str,
        num_rounds: int,
        first_round: int,
        clients: Sequence[Participant],
        history: Sequence[Evaluation] = (),
    ) -> None:
        super().start(title, num_rounds, first_round, clients, history)
        work = (
            f"rounds {first_round} to {num_rounds}"
            if first_round <= num_rounds
            else f"all {num_rounds} rounds are done"
        )
        self.write(f"{title}: {work}, {len(clients)} clients")
        for line in clients if len(clients) <= MANY else ():
            self.write(f"  {holding(line)}")
        if len(clients) > MANY:
            examples = [line.examples for line in clients]
            least, most = (choose(clients, key=lambda line: line.budget) for choose in (min, max))
            self.write(
                f"  {min(examples)} to {max(examples)} examples per client, "
                f"budgets from {budget(least)} to {budget(most)} experts"
            )

    def joined(self, client: int, who: Participant, again: bool) -> None:
        super().joined(client, who, again)
        self.write(joining(who, again))

    def left(self, client: int) -> None:
        super().left(client)
        self.write(f"{self.rows[client].line.name} left")

    def phase(self, text: str) -> None:
        super().phase(text)
        self.write(text)

    def round_started(self, round: int) -> None:
        super().round_started(round)
        self._answered = 0
        self.write(f"round {round}/{self.num_rounds}")

    def step(self, client: int, step: int, steps: int, loss: float) -> None:
        super().step(client, step, steps, loss)
        row = self.rows[client]
        self._heartbeat(f"  {row.line.name}: step {step}/{steps}, loss {decimal(row.loss)}")

    def client_done(self, round: int, client: int, done: ClientRound) -> None:
        super().client_done(round, client, done)
        name = self.rows[client].line.name
        self._answered += 1
        if done.status == "ok" and len(self.rows) > MANY:
            self._heartbeat(f"  {name}: done, client {self._answered} of this round")
            return
        if done.status == "left":
            return  # which has an event of its own
        if done.status != "ok":
            self.write(f"  {name}: {done.status}" + (f": {done.reason}" if done.reason else ""))
            return
        self.write(
            f"  {name}: held {done.resident}/{done.total_experts} experts, trained {done.trained}, "
            f"received {human_bytes(done.bytes_down)}, sent {human_bytes(done.bytes_up)}, "
            f"loss {decimal(mean_loss(done))}, {human_seconds(done.seconds)}, {peak(done)}"
            + ("" if done.deadline_s is None else f"; {deadline_cost(done)}")
        )

    def evaluating(self, done: int, total: int) -> None:
        super().evaluating(done, total)
        self._heartbeat(f"  evaluating: {done}/{total} rows")

    def evaluated(self, evaluation: Evaluation) -> None:
        super().evaluated(evaluation)
        which = "watched rows" if evaluation.kind == "watch" else "held-out rows"
        self.write(f"  after round {evaluation.round}: {describe(evaluation)} ({evaluation.rows} {which})")

    def personal(self, round: int, found: Sequence[Personal]) -> None:
        super().personal(round, found)
        self.write(f"  after round {round}: {personal_line(found)}")

    def round_done(self, round: int, seconds: float, bytes_down: int, bytes_up: int) -> None:
        super().round_done(round, seconds, bytes_down, bytes_up)
        left = f", about {human_seconds(self.time_left())} left" if round < self.num_rounds else ""
        self.write(
            f"round {round}/{self.num_rounds} done in {human_seconds(seconds)}: "
            f"{human_bytes(bytes_down)} down, {human_bytes(bytes_up)} up{left}"
        )

    def warning(self, text: str) -> None:
        self.write(f"warning: {text}")

    def note(self, text: str) -> None:
        self.write(text)

    def finish(self, text: str) -> None:
        self.write(text)

    def write(self, line: str, style: str | None = None) -> None:
        super().write(line)
        self._last_line = self.clock()

    def _heartbeat(self, line: str) -> None:
        if self.clock() - self._last_line >= HEARTBEAT_S:
            self.write(line)
