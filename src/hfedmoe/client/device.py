"""A device of the federation: one client's model, data and limits, and what it does with them."""

import hashlib
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hfedmoe.client.history import ClientHistory
from hfedmoe.client.learner import Learner
from hfedmoe.client.scoring import bootstrap, ranked_by
from hfedmoe.client.training import train
from hfedmoe.client.trouble import smaller
from hfedmoe.config import RunConfig
from hfedmoe.config.budgets import in_experts
from hfedmoe.data.encoding import Encoder
from hfedmoe.data.example import Example
from hfedmoe.device.learned import Note
from hfedmoe.device.memory import peak_bytes, sub_model_bytes
from hfedmoe.device.pace import Clock, Pace
from hfedmoe.method.methods import Outlook
from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.payload import extract, load, load_all
from hfedmoe.seeds import generator
from hfedmoe.wire.messages import Update
from hfedmoe.wire.trouble import OUT_OF_MEMORY, Trouble


@dataclass
class Device:
    """One client's model, data and limits."""

    number: int
    name: str
    model: MoEModel
    encoder: Encoder
    examples: list[Example]
    config: RunConfig
    initial: dict[str, Tensor] | None = None
    """Trained tensors as they were at first, where the model in memory is shared with other (simulated) clients."""
    on_step: Callable[[int, int, float], None] | None = None
    """Called with (client, step, loss) after every local step."""
    budget_experts: int | None = None
    """The budget in experts over all layers, where clients.budgets gives memory or a device; None: it gives experts."""
    notes: Path | None = None
    """File of a real device in which it notes what it attempts, so that a kill by the system is noticed."""
    clock: Clock = time.perf_counter
    """Measures training against the deadline."""

    @property
    def learner(self) -> Learner:
        """What it trains with."""
        return Learner(self.model, self.examples, self.encoder, self.config, self.number)

    @property
    def simulated(self) -> bool:
        """Whether other clients of the same process use the same model in memory."""
        return self.initial is not None

    @property
    def budget(self) -> int:
        """Experts over all layers."""
        total = sum(self.model.num_experts)
        if self.budget_experts is not None:
            return min(self.budget_experts, total)
        budgets = self.config.clients.budgets
        return in_experts(budgets[self.number % len(budgets)], total)

    @property
    def smallest(self) -> int:
        """The fewest experts over all layers that it can train with: top-k in every layer."""
        return max(layer.top_k for layer in self.model.layers) * len(self.model.layers)

    @property
    def deadline_s(self) -> float | None:
        """Seconds of training per round."""
        deadlines = self.config.clients.deadlines_s
        return None if deadlines is None else deadlines[self.number % len(deadlines)]

    @property
    def note(self) -> Note:
        """What this device leaves on its disk while it works."""
        work = (self.config.model, self.config.data, self.config.train, self.config.method)
        task = hashlib.sha256("".join(part.model_dump_json() for part in work).encode()).hexdigest()[:16]
        return Note(None if self.simulated else self.notes, task)

    def allowed(self, history: ClientHistory) -> int:
        """Experts over all layers that it may hold now.

        Decision: what a client learned by running out of memory holds also where residency is "all".
        """
        whole = self.config.method.residency == "all"
        budget = sum(self.model.num_experts) if whole else self.budget
        return budget if history.limit is None else min(budget, history.limit)

    def activation_budget(self) -> list[int] | None:
        """Experts per layer that one batch may train."""
        activation = self.config.clients.activation
        if activation is None:
            return None
        return [in_experts(activation, number) for number in self.model.num_experts]

    def lr_factor(self, round: int) -> float:
        """What is left of train.lr in this round: 1 in the first, `lr_final_share` in the last, evenly between."""
        rounds = self.config.federation.rounds
        return 1 - (1 - self.config.train.lr_final_share) * (round - 1) / max(1, rounds - 1)

    def plan(self, history: ClientHistory, round: int, usage: list[Tensor] | None = None) -> list[Tensor]:
        """The experts to hold in this round, as the method says: bool [E] per layer, top-k at least in every layer.

        Args:
            usage: of the federation so far, float32 [E] per layer, for a client that has seen nothing yet.

        Raises:
            CannotHoldError: the method wants it to hold more than it has room for.
        """
        outlook = Outlook(
            num_experts=self.model.num_experts,
            top_k=[layer.top_k for layer in self.model.layers],
            budget=self.allowed(history),
            contribution=lambda: self.contribution(history, round, usage),
            draws=generator(self.config.seed, "residency", self.number, round),
        )
        return self.learner.method.hold(outlook, self.config.method)

    def contribution(self, history: ClientHistory, round: int, usage: list[Tensor] | None = None) -> list[Tensor]:
        """What every expert is worth to this client, [E] per layer; the first time this may take a first pass."""
        method, ranked = self.config.method, ranked_by(self.learner)
        if ranked is None or ranked.drawn:
            return self._draw(round)
        if not history.observed:
            if method.bootstrap == "prior" and usage is not None:
                history.prior = usage
            elif history.prior is None:
                if method.bootstrap in ("prior", "none"):
                    return self._draw(round)
                self._bootstrap(history)
        return history.contribution()

    def _draw(self, round: int) -> list[Tensor]:
        draws = generator(self.config.seed, "residency", self.number, round)
        return [torch.rand(number, generator=draws) for number in self.model.num_experts]

    @property
    def _streams(self) -> bool:
        """Whether its first pass reads experts when they are needed: where not all of them are in memory anyway."""
        return self.model.store is not None and not self.model.masked

    def _bootstrap(self, history: ClientHistory) -> None:
        if self.initial is not None:
            load_all(self.model, self.initial)
        if not self._streams:
            self.model.set_resident(None)
        with self.model.streaming(self.allowed(history)) if self._streams else nullcontext():
            bootstrap(self.learner, history)

    def pace(self, history: ClientHistory, resident: list[Tensor]) -> Pace | None:
        """How this round keeps the deadline; None: there is none."""
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

    def learn(self, trouble: Trouble, history: ClientHistory, doing: str, held: int) -> Trouble:
        """Come back with less next time: changes the history, and returns the trouble with a reason that says so.

        Args:
            doing: "plan" or "train".
            held: experts that it held, or was going to hold.
        """
        if trouble.status != OUT_OF_MEMORY:
            return Trouble(trouble.status, f"{trouble.reason}; it trains fewer experts per step next round")
        if doing == "plan" and not self._streams and self.config.method.bootstrap == "forward":
            # Decision: a pass over all experts says nothing about the budget, so it is not tried again.
            history.prior = self._draw(0)
            return Trouble(
                trouble.status,
                f"{trouble.reason}, in its first pass over all {sum(self.model.num_experts)} experts; it begins with "
                "random ones next round (a safetensors checkpoint could be read expert by expert)",
            )
        history.limit = smaller(held, self.smallest)
        then = f"it holds {history.limit} next round" if history.limit else cannot(self)
        return Trouble(trouble.status, f"{trouble.reason}, with {held} experts; {then}")


def cannot(device: Device) -> str:
    """Why a device whose limit is 0 experts takes no part, in words."""
    top_k = max(layer.top_k for layer in device.model.layers)
    return (
        f"top-{top_k} routing in {len(device.model.layers)} layers needs {device.smallest}, so it cannot take part; "
        "use shorter texts, smaller batches or a smaller model.expert_dtype"
    )
