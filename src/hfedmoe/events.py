"""The events of a run, for whoever watches it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self


@dataclass(frozen=True, slots=True)
class ClientLine:
    """A client as it is known before the first round; `budget` counts experts over all layers."""

    name: str
    examples: int
    budget: int
    budget_share: float


@dataclass(frozen=True)
class PaceLine:
    """What a deadline (seconds per round) left of a client's work; `activation` counts experts per layer and step."""

    steps: int
    steps_wanted: int
    activation: float
    activation_wanted: float
    deadline_s: float


@dataclass(frozen=True, slots=True)
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
    pace: PaceLine | None = None


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
    pace: PaceLine | None = None


class Watcher:
    """The events of a run, in the order in which they come; by default nothing is done about them.

    A client is named by its position in the list that `start` was given.
    """

    def __enter__(self) -> Self:
        """Begin to watch."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the terminal as it was found, whatever happened."""
        return

    def start(
        self,
        title: str,
        num_rounds: int,
        first_round: int,
        clients: Sequence[ClientLine],
        history: Sequence[Score] = (),
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
