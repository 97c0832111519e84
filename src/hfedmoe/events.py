"""The events of a run, and the record of what a client did in a round.

Every figure of a client's round is in `ClientRound` and nowhere else. metrics.jsonl, the screen, the totals and the
report read it. A new figure is one new field here, set where it is measured. A figure that the client measures is a
field of `Work`, with a limit in `wire.checks`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a client says that it did in a round. It is sent to the server unchanged."""

    examples: int = 0
    """The client's own rows."""
    steps: int = 0
    """Optimizer steps done, out of `steps_wanted`."""
    steps_wanted: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    mean_loss: float | None = None
    """Over its steps."""
    seconds: float = 0.0
    """Of training."""
    peak_bytes: int = 0
    peak_is_measured: bool = False
    """Whether the peak was read from the operating system; else it is predicted (a simulated client)."""
    activation: float | None = None
    """Experts per layer that a step could train, the mean over layers and steps; None: all resident ones."""
    deadline_s: float | None = None
    """Most seconds of training in the round; None: no deadline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientRound(Work):
    """One client in one round, as the server knows it. `status` is "ok", or a word such as "late" with a `reason`.

    If the status is not "ok", only the client's number, its reason and its bytes are set.
    """

    client: int = 0
    status: str = "ok"
    reason: str = ""
    weight: int = 0
    """|D_c| used in averaging: `examples`, limited by `federation.max_weight`."""
    resident: int = 0
    """Experts on the device, over all layers."""
    trained: int = 0
    """Those with at least one optimizer step."""
    total_experts: int = 0
    """Of the model, over all layers."""
    tokens: float = 0.0
    """(token, expert) pairs that its experts processed."""
    activation_wanted: float | None = None
    """What `activation` would be without a deadline."""
    staleness: int = 0
    """How many rounds the model went on while it worked."""
    routing_consistency: float | None = None
    """r(c) of eq. 18, the mean over the layers; known when the round ends."""
    bytes_down: int = 0
    bytes_up: int = 0

    def to_json(self) -> dict[str, Any]:
        """Its entry in metrics.jsonl."""
        known = asdict(self)
        if self.status == "ok":
            del known["reason"]
            return known
        return {name: known[name] for name in ("client", "status", "reason", "bytes_down", "bytes_up")}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Self:
        """The inverse of `to_json`. Missing fields get their default; unknown keys are ignored."""
        return cls(**{field.name: entry[field.name] for field in fields(cls) if field.name in entry})


@dataclass(slots=True)
class ClientTotals:
    """What one client did over the rounds that it completed.

    Most fields are sums. `resident` and `trained` are those of its last round, peaks are the largest, `activation` and
    `activation_wanted` are means over its rounds with a deadline. `steps` count only rounds with a deadline.
    """

    name: str = ""
    rounds: int = 0
    resident: int = 0
    trained: int = 0
    total_experts: int = 0
    predicted_bytes: int | None = None
    measured_bytes: int | None = None
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    paced_rounds: int = 0
    steps: int = 0
    steps_wanted: int = 0
    activation: float | None = None
    activation_wanted: float | None = None
    deadline_s: float | None = None

    def add(self, done: ClientRound) -> None:
        """Count a round."""
        self.bytes_down += done.bytes_down
        self.bytes_up += done.bytes_up
        if done.status != "ok":
            return
        self.rounds += 1
        self.resident, self.trained, self.total_experts = done.resident, done.trained, done.total_experts
        self.seconds += done.seconds
        if done.peak_is_measured:
            self.measured_bytes = max(self.measured_bytes or 0, done.peak_bytes)
        else:
            self.predicted_bytes = max(self.predicted_bytes or 0, done.peak_bytes)
        if done.deadline_s is not None:
            self.paced_rounds += 1
            self.steps += done.steps
            self.steps_wanted += done.steps_wanted
            self.activation = _mean(self.activation, done.activation, self.paced_rounds)
            self.activation_wanted = _mean(self.activation_wanted, done.activation_wanted, self.paced_rounds)
            self.deadline_s = done.deadline_s


def _mean(mean: float | None, value: float | None, count: int) -> float:
    """The mean of `count` values, of which `value` is the last."""
    return ((mean or 0.0) * (count - 1) + (value or 0.0)) / count


@dataclass(frozen=True, slots=True)
class Participant:
    """What is known about a client before the first round; `budget` counts experts over all layers."""

    name: str
    examples: int
    budget: int
    budget_share: float


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the global model; accuracy and macro-F1 are shares, None for tasks without choices."""

    round: int
    accuracy: float | None
    macro_f1: float | None
    loss: float | None
    rows: int
    kind: Literal["all", "watch"] = "all"
    """On all held-out rows, or on the watched ones."""
    choice_loss: float | None = None
    """Among the choices, if the run trains that (`train.loss = "choices"`)."""

    @property
    def trained_loss(self) -> float | None:
        """The loss that the clients train: among the choices, or else over the vocabulary."""
        return self.loss if self.choice_loss is None else self.choice_loss


@dataclass(frozen=True, slots=True)
class Score:
    """One model on the rows that a site kept back; accuracy and macro-F1 are shares, None for tasks without choices."""

    accuracy: float | None
    macro_f1: float | None
    loss: float
    interval: tuple[float, float] | None = None
    """Of the accuracy, with 95 % confidence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnResult:
    """What a device says of its sub-model on rows that it kept back, before the federation and after: only numbers.

    Accuracies are counts of right answers; they and macro-F1 are None for tasks without choices.
    """

    trained_rows: int
    own_rows: int
    """Kept back: the rows of the other figures; 0: too few to be told, and nothing else is set."""
    right_before: int | None = None
    won: int | None = None
    """Rows that are right only after."""
    lost: int | None = None
    """Rows that are right only before."""
    f1_before: float | None = None
    f1_after: float | None = None
    loss_before: float = 0.0
    loss_after: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnScore:
    """What a client says, while a run goes on, of its sub-model on rows that it kept back: only numbers."""

    own_rows: int
    """Kept back: the rows of the other figures; 0: too few to be told, and nothing else is set."""
    right: int | None = None
    """Right answers among them; None for tasks without choices."""
    loss: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Personal:
    """How good the model is for one client after a round, on rows that it kept back."""

    client: int
    name: str
    own_rows: int
    accuracy: float | None
    """Of its sub-model: the experts that it held in the round, as the shared model has them now, and what it keeps of
    its own. A share; None for tasks without choices."""
    loss: float
    shared_accuracy: float | None = None
    """Of the shared model, with all experts; None also where nobody has both the model and the rows."""
    shared_loss: float | None = None

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Self:
        """From its entry in metrics.jsonl. Unknown keys are ignored."""
        return cls(**{field.name: entry[field.name] for field in fields(cls) if field.name in entry})


@dataclass(frozen=True, slots=True)
class Tuning:
    """What a client gained by training the experts that it holds further, for itself."""

    steps: int
    """That it was asked for; with a deadline it may have done fewer."""
    before: Score
    """Of its sub-model of the shared model: the experts that it held in its last round."""
    after: Score
    """Of the same experts, trained further."""
    gain: float | None = None
    """Accuracy after less before."""
    gain_interval: tuple[float, float] | None = None
    """With 95 % confidence."""


@dataclass(frozen=True, slots=True)
class SiteGain:
    """What the federation gave to one site, on rows of its own that nobody trained on."""

    client: int
    name: str
    trained_rows: int
    own_rows: int
    """Kept back: the rows of the scores."""
    labels: dict[str, int]
    """Of all its rows, how many have each label that occurs; empty for tasks without labels."""
    num_labels: int
    """Of the task."""
    before: Score
    federated: Score | None
    """Of the shared model with all its experts; None: who measured has only some of them (a real device)."""
    alone: Score | None = None
    """Of a model that the site trained by itself, with as many steps; None: not measured."""
    gain: float | None = None
    """Accuracy of the federation less that alone, or less that before where that was not measured."""
    gain_interval: tuple[float, float] | None = None
    """With 95 % confidence."""
    tuning: Tuning | None = None
    """None: it did not train further (`evaluation.tune_steps`), or does not say."""
    own: Score | None = None
    """Of its sub-model: the experts that it held in its last round, as the shared model has them; None: the method's
    clients have no such model, or it never took part."""

    @property
    def reached(self) -> Score:
        """After the federation: what the gain is of."""
        found = self.own if self.federated is None else self.federated
        assert found is not None
        return found

    def to_json(self) -> dict[str, Any]:
        """Its entry in metrics.jsonl."""
        entry = asdict(self)
        if self.tuning is None:
            del entry["tuning"]
        return entry

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""

        def pair(value: Any) -> Any:
            return None if value is None else tuple(value)

        def score(value: Any) -> Any:
            return None if value is None else Score(**(value | {"interval": pair(value["interval"])}))

        def with_interval(part: dict[str, Any], *models: str) -> dict[str, Any]:
            return part | {name: score(part[name]) for name in models} | {"gain_interval": pair(part["gain_interval"])}

        found = with_interval({"own": None} | entry, "before", "federated", "alone", "own")
        if "tuning" in entry:
            found["tuning"] = Tuning(**with_interval(entry["tuning"], "before", "after"))
        return cls(**found)


class Watcher:
    """Receives the events of a run, in order; by default it does nothing.

    A client is identified by its position in the list that `start` received, or by the one that `joined` gave it.
    """

    def __enter__(self) -> Self:
        """Begin to watch."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching and restore the terminal, also after an error."""
        return

    def start(
        self,
        title: str,
        num_rounds: int,
        first_round: int,
        clients: Sequence[Participant],
        history: Sequence[Evaluation] = (),
    ) -> None:
        """The run begins; with `history` and a later `first_round` it continues."""

    def cannot_join(self, name: str, reason: str) -> None:
        """A client that is known by name takes no part in the run; a warning says it too."""

    def joined(self, client: int, who: Participant, again: bool) -> None:
        """A client takes part from now on: a new one, with the next position, or `again`, with the position it had."""

    def left(self, client: int) -> None:
        """A client is no longer connected. It may come back."""

    def phase(self, text: str) -> None:
        """Something other than a client's work begins, such as loading."""

    def round_started(self, round: int) -> None:
        """A round begins."""

    def client_started(self, round: int, client: int, steps: int) -> None:
        """A client begins its local steps."""

    def step(self, client: int, step: int, steps: int, loss: float) -> None:
        """A client has done `step` of `steps`."""

    def client_experts(self, round: int, client: int, held: Sequence[bool], trained: Sequence[bool]) -> None:
        """Which experts a client held and trained, over all layers; before `client_done`."""

    def client_done(self, round: int, client: int, done: ClientRound) -> None:
        """A client has answered, or is left out of the round."""

    def evaluating(self, done: int, total: int) -> None:
        """`done` of `total` held-out rows are measured."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """The global model was measured."""

    def personal(self, round: int, found: Sequence[Personal]) -> None:
        """Clients of a round measured the model on rows of their own (`evaluation.personal_every`)."""

    def round_done(self, round: int, seconds: float, bytes_down: int, bytes_up: int) -> None:
        """A round is complete; the bytes are those of this round."""

    def warning(self, text: str) -> None:
        """Something that the user should know, but that does not stop the run."""

    def note(self, text: str) -> None:
        """Something worth knowing that is no trouble."""

    def finish(self, text: str) -> None:
        """The run is over."""

    def final_table(self, clients: Sequence[ClientTotals], before: Evaluation | None, after: Evaluation | None) -> None:
        """The totals of every client, and the evaluations before and after the run."""

    def site_gains(self, gains: Sequence[SiteGain]) -> None:
        """What each site gained, at the end of a run."""


class Silent(Watcher):
    """Shows nothing."""


class Forwarding(Watcher):
    """Passes every event on to another watcher; a subclass overrides those that it treats otherwise."""

    def __init__(self, inner: Watcher) -> None:
        self.inner = inner


def _passed_on(name: str) -> Callable[..., None]:
    def event(self: Forwarding, *args: Any, **named: Any) -> None:
        getattr(self.inner, name)(*args, **named)

    event.__doc__ = getattr(Watcher, name).__doc__
    return event


EVENTS = tuple(name for name in vars(Watcher) if not name.startswith("_"))
"""The names of all events."""
for _name in EVENTS:  # none can be forgotten, also none of a later version
    setattr(Forwarding, _name, _passed_on(_name))
