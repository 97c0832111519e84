"""A device of the federation: one client's model, data and limits, and what it does with them."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from hfedmoe.client.batches import num_first_batches
from hfedmoe.client.history import ClientHistory
from hfedmoe.client.judging import Judged, compared, scored
from hfedmoe.client.kept import Memory
from hfedmoe.client.learner import Learner
from hfedmoe.client.merging import mixtures
from hfedmoe.client.own import begin_own
from hfedmoe.client.place import Place
from hfedmoe.client.policy import ANYTHING, Policy
from hfedmoe.client.scoring import bootstrap
from hfedmoe.client.training import LocalUpdate, train
from hfedmoe.config import RunConfig
from hfedmoe.config.budgets import in_experts
from hfedmoe.data.encoding import Encoder
from hfedmoe.data.example import Example
from hfedmoe.data.kept import LEAST
from hfedmoe.device.memory import peak_bytes, sub_model_bytes
from hfedmoe.device.pace import Clock, Pace
from hfedmoe.events import OwnResult, OwnScore
from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.payload import MismatchError, check, extract, kind_of, load, pack, public, reset, restore
from hfedmoe.moe.ranks import cut, padded
from hfedmoe.wire.messages import Update


@dataclass
class Device:
    """One client's model, data and limits."""

    number: int
    name: str
    model: MoEModel
    encoder: Encoder
    examples: list[Example]
    config: RunConfig
    initial: dict[str, Tensor]
    """First values of the trained tensors (`payload.initial_tensors`). The model may hold those of another client of
    this process."""
    base: str = ""
    """Digest of its base model (`models.digest`); empty for simulated clients, which share the server's model."""
    simulated: bool = False
    """Whether clients of one process share one model in memory. Memory peaks can then only be predicted."""
    forecast: Callable[[int], int] | None = None
    """Of a simulated client: experts that it holds -> peak bytes of a device with them, as `hfedmoe plan` says; None:
    only weights, gradients and the optimizer's state are counted."""
    on_step: Callable[[int, int, float], None] | None = None
    """Called with (client, step, loss) after every local step."""
    budget_experts: int | None = None
    """The budget in experts over all layers if clients.budgets gives memory or a device; None if it gives experts."""
    notes: Path | None = None
    """File in which a real device notes what it attempts. It shows later that the system killed the process."""
    kept: list[Example] = field(default_factory=list)
    """Rows of its own that it never trains on (`data.kept`); simulated clients leave it empty."""
    judge: Callable[[list[Example]], Judged] | None = None
    """Measures the model as it is on rows; None: the device does not measure."""
    tuned: Path | None = None
    """File in which a real device keeps what it trains for itself; simulated clients keep it in their state."""
    policy: Policy = ANYTHING
    """What its owner allows."""
    clock: Clock = time.perf_counter
    """Measures training against the deadline."""

    @property
    def place(self) -> Place:
        """What is known about the device without its model."""
        return Place(
            self.number,
            self.name,
            self.config,
            self.model.num_experts,
            [layer.top_k for layer in self.model.layers],
            self.budget_experts,
            self.model.store is not None and not self.model.masked,
            None if self.simulated else self.notes,
        )

    @property
    def learner(self) -> Learner:
        """What it trains with."""
        return Learner(self.model, self.examples, self.encoder, self.config, self.number)

    def within(self, policy: Policy) -> "Device":
        """This device with what its owner allows now."""
        return self if policy == self.policy else replace(self, policy=policy)

    @property
    def deadline_s(self) -> float | None:
        """Seconds of training per round."""
        deadlines = self.config.clients.deadlines_s
        return self.policy.deadline(None if deadlines is None else deadlines[self.number % len(deadlines)])

    def activation_budget(self) -> list[int] | None:
        """Experts per layer that one batch may train."""
        activation = self.config.clients.activation
        if activation is None:
            return None
        return [in_experts(activation, number) for number in self.model.num_experts]

    def lr_factor(self, round: int) -> float:
        """The factor on train.lr in this round: linear from 1 in the first to `lr_final_share` in the last."""
        rounds = self.config.federation.rounds
        return 1 - (1 - self.config.train.lr_final_share) * (round - 1) / max(1, rounds - 1)

    @property
    def first_steps(self) -> int:
        """Batches of its first pass: no more than its owner allows steps in a round."""
        return num_first_batches(self.learner, self.policy.max_steps)

    def first_pass(self, history: ClientHistory) -> None:
        """Compute the first scores: a pass over some of the client's rows with every expert.

        Its owner's limits are those of a round: a batch counts as a step.
        """
        restore(self.model, self.initial)
        streams = self.place.streams
        if not streams:
            self.model.set_resident(None)
        with self.model.streaming(self.place.allowed(history)) if streams else nullcontext():
            bootstrap(self.learner, history, self.policy.max_steps, self.policy.max_seconds, self.clock)

    def pace(self, history: ClientHistory, resident: list[Tensor]) -> Pace | None:
        """What makes this round keep its deadline; None: no deadline."""
        if self.deadline_s is None:
            return None
        most = [int(keep.sum()) for keep in resident]
        configured = self.activation_budget()
        if configured is not None:
            most = [min(pair) for pair in zip(most, configured, strict=True)]
        least = [min(number, layer.top_k) for number, layer in zip(most, self.model.layers, strict=True)]
        return Pace(history.step_times, self.deadline_s, self.config.train.steps, most, least, self.clock)

    def with_own(
        self, history: ClientHistory, resident: list[Tensor], received: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """What was received, and what the client keeps of its own. Raises MismatchError if it was sent that."""
        private = self.learner.method.private
        for name in received:
            if kind_of(name) in private:
                raise MismatchError(f"{name} is the client's own: a server must not send it")
        if not private:
            return received
        reset(self.model, self.initial)
        own = extract(self.model, resident)
        if history.private is not None:
            own = history.private.over(own, resident)
        return received | {name: tensor for name, tensor in own.items() if kind_of(name) in private}

    def _begin(self, history: ClientHistory, resident: list[Tensor], received: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the round begins with: what was received, what the client keeps of its own, and what it adds.

        Raises:
            MismatchError: among what was received is something that the client keeps.
        """
        method, numbers = self.learner.method, self.model.num_experts
        received = self.with_own(history, resident, received)
        if method.own is not None:
            begin_own(received, history.contribution())
        if method.begin is None:
            return received
        start = dict(received)
        if history.began is not None and history.ended is not None:
            settings = self.learner.settings
            began, ended = history.began.over(received, resident), history.ended.over(received, resident)
            for name, tensor in received.items():
                if kind_of(name) == "experts":
                    start[name] = torch.stack(
                        [
                            method.begin(new.reshape(-1), old.reshape(-1), last.reshape(-1), settings).view_as(new)
                            for new, old, last in zip(tensor, began[name], ended[name], strict=True)
                        ]
                    )
        history.began = (history.began or Memory.nothing(numbers)).updated(start, resident)
        return start

    def _remember(self, history: ClientHistory, resident: list[Tensor], usage: list[Tensor]) -> None:
        """Keep what the method leaves on the client; `usage` of this round, [E] per layer."""
        method, numbers = self.learner.method, self.model.num_experts
        if method.merged is not None:
            history.usage = usage
        if not method.private and method.begin is None:
            return
        now = extract(self.model, resident)
        if method.private:
            own = {name: tensor for name, tensor in now.items() if kind_of(name) in method.private}
            history.private = (history.private or Memory.nothing(numbers)).updated(own, resident)
        if method.begin is not None:
            history.ended = (history.ended or Memory.nothing(numbers)).updated(now, resident)

    def hold(
        self,
        history: ClientHistory,
        resident: list[Tensor],
        tensors: dict[str, Tensor],
        start: Callable[[ClientHistory, list[Tensor], dict[str, Tensor]], dict[str, Tensor]],
    ) -> None:
        """Make experts resident, and put in what was received and what `start` adds. Raises MismatchError."""
        method = self.learner.method
        self.model.set_resident(resident, self.place.at_least)
        tensors = padded(tensors, self.place.rank, self.config.train.rank)
        own = tensors
        if method.merged is not None:
            check(self.model, tensors, [torch.ones_like(keep) for keep in resident])
            own = pack(tensors, resident)
        load(self.model, start(history, resident, own), resident)
        if method.merged is not None:
            room = method.merged(self.model.num_experts, self.place.allowed(history), self.config.method)
            self.model.stand_in(mixtures(self.model, resident, room, history.usage), tensors)

    def learn(self, history: ClientHistory, resident: list[Tensor], round: int) -> LocalUpdate:
        """The local steps of a round, with the model as it is. Raises TrainingError."""
        per_token = self.learner.method.experts_per_token
        most = None if per_token is None else per_token(self.place.share, self.place.top_k[0])
        on_step = self.on_step
        with self.model.limited_top_k(most):
            return train(
                self.learner,
                history,
                activation_budget=self.activation_budget(),
                lr_factor=self.lr_factor(round),
                on_step=None if on_step is None else lambda step, loss: on_step(self.number, step, loss),
                pace=self.pace(history, resident),
            )

    def measure(self, history: ClientHistory, resident: list[Tensor], tensors: dict[str, Tensor]) -> OwnResult:
        """Measure its sub-model on the rows that it kept back: as it was before any training, and with these tensors.

        Fewer than `kept.LEAST` rows are not measured: a right answer of one row would say too much about that row.
        """
        if not self.measurable:
            return self.told(None, None)
        restore(self.model, self.initial)
        self.model.set_resident(resident, self.place.at_least)
        before = self.judged()
        self.hold(history, resident, tensors, self.with_own)
        return self.told(before, self.judged())

    def score(self, history: ClientHistory, resident: list[Tensor], tensors: dict[str, Tensor]) -> OwnScore:
        """Measure its sub-model with these tensors on the rows that it kept back, if they are enough."""
        if not self.measurable:
            return OwnScore(own_rows=0)
        self.hold(history, resident, tensors, self.with_own)
        found = self.judged()
        assert found is not None
        return scored(self.kept, found)

    @property
    def measurable(self) -> bool:
        """Whether it measures, and kept enough rows back for that."""
        return self.judge is not None and len(self.kept) >= LEAST

    def judged(self) -> Judged | None:
        """The model as it is, on the rows that it kept back; None: it is not measurable."""
        return self.judge(self.kept) if self.judge is not None and self.measurable else None

    def told(self, before: Judged | None, after: Judged | None) -> OwnResult:
        """What the server may know of two measurements; nothing but the number of rows that it trains on without."""
        trained = len(self.examples)
        if before is None or after is None:
            return OwnResult(trained_rows=trained, own_rows=0)
        return compared(trained, self.kept, before, after)

    def train(self, history: ClientHistory, resident: list[Tensor], tensors: dict[str, Tensor], round: int) -> Update:
        """Train the resident experts and return what changed.

        Its tensors are those of the model as far as possible, so that a large message is not copied: write it before
        the model is used again.
        """
        method, rank = self.learner.method, self.place.rank
        if method.own == "graft" and history.private is None and not history.observed:
            self.first_pass(history)  # shows which experts are worth most to the client
        self.hold(history, resident, tensors, self._begin)
        local = self.learn(history, resident, round)
        self._remember(history, resident, local.usage)
        if not self.simulated:
            peak = peak_bytes(self.model.device)
        elif self.forecast is not None:
            peak = self.forecast(sum(int(keep.sum()) for keep in resident))
        else:
            peak = sub_model_bytes(self.model, resident)
        sent = local.trained if method.sends == "trained" else resident
        return Update(
            tensors=cut(public(extract(self.model, sent, live=True), method.private), rank),
            sent=sent,
            trained=local.trained,
            usage=local.usage,
            importance=local.importance,
            tokens=local.tokens,
            work=replace(
                local.work,
                peak_bytes=peak,
                peak_is_measured=not self.simulated,
                deadline_s=self.deadline_s,
            ),
        )
