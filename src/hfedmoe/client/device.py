"""A device of the federation: one client's model, data and limits, and what it does with them."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from hfedmoe.client.history import ClientHistory
from hfedmoe.client.learner import Learner
from hfedmoe.client.place import Place
from hfedmoe.client.scoring import bootstrap
from hfedmoe.client.training import train
from hfedmoe.config import RunConfig
from hfedmoe.config.budgets import in_experts
from hfedmoe.data.encoding import Encoder
from hfedmoe.data.example import Example
from hfedmoe.device.memory import peak_bytes, sub_model_bytes
from hfedmoe.device.pace import Clock, Pace
from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.payload import extract, load, restore
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
    on_step: Callable[[int, int, float], None] | None = None
    """Called with (client, step, loss) after every local step."""
    budget_experts: int | None = None
    """The budget in experts over all layers if clients.budgets gives memory or a device; None if it gives experts."""
    notes: Path | None = None
    """File in which a real device notes what it attempts. It shows later that the system killed the process."""
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

    @property
    def deadline_s(self) -> float | None:
        """Seconds of training per round."""
        deadlines = self.config.clients.deadlines_s
        return None if deadlines is None else deadlines[self.number % len(deadlines)]

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

    def first_pass(self, history: ClientHistory) -> None:
        """Compute the first scores: a pass over some of the client's rows with every expert."""
        restore(self.model, self.initial)
        streams = self.place.streams
        if not streams:
            self.model.set_resident(None)
        with self.model.streaming(self.place.allowed(history)) if streams else nullcontext():
            bootstrap(self.learner, history)

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

    def train(self, history: ClientHistory, resident: list[Tensor], tensors: dict[str, Tensor], round: int) -> Update:
        """Train the resident experts and return what changed."""
        self.model.set_resident(resident)
        load(self.model, tensors, resident)
        on_step = self.on_step
        local = train(
            self.learner,
            history,
            activation_budget=self.activation_budget(),
            lr_factor=self.lr_factor(round),
            on_step=None if on_step is None else lambda step, loss: on_step(self.number, step, loss),
            pace=self.pace(history, resident),
        )
        peak = sub_model_bytes(self.model, resident) if self.simulated else peak_bytes(self.model.device)
        sent = local.trained if self.learner.method.sends == "trained" else resident
        return Update(
            tensors=extract(self.model, sent),
            sent=sent,
            trained=local.trained,
            usage=local.usage,
            importance=local.importance,
            tokens=local.tokens,
            work=replace(local.work, peak_bytes=peak, peak_is_measured=not self.simulated, deadline_s=self.deadline_s),
        )
