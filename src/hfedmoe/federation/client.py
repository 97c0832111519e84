"""The client: a Flower ClientApp that describes itself, plans what it holds, and trains."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from safetensors.torch import load as read_blob
from safetensors.torch import save as write_blob
from torch import Tensor

from hfedmoe.config import RunConfig
from hfedmoe.data.encoding import Encoder
from hfedmoe.data.rows import Example
from hfedmoe.device.budgets import in_experts
from hfedmoe.device.memory import peak_process_bytes, sub_model_bytes
from hfedmoe.federation.messages import (
    Description,
    Update,
    describe_reply,
    facts_of,
    pack_bits,
    record,
    tensors_of,
    train_reply,
    unpack_bits,
)
from hfedmoe.history import ClientHistory
from hfedmoe.method.selection import select
from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.payload import extract, load
from hfedmoe.seeds import generator
from hfedmoe.training import bootstrap, train

HISTORY = "history"


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

    @property
    def simulated(self) -> bool:
        return self.initial is not None

    @property
    def budget(self) -> int:
        """Experts over all layers."""
        budgets = self.config.clients.budgets
        return in_experts(budgets[self.number % len(budgets)], sum(self.model.num_experts))

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

    def plan(self, history: ClientHistory, round: int) -> list[Tensor]:
        """The experts to hold in this round: bool [E] per layer (eq. 15, with top-k at least in every layer)."""
        numbers, method = self.model.num_experts, self.config.method
        if method.residency == "all" or self.budget >= sum(numbers):
            return [torch.ones(number, dtype=torch.bool) for number in numbers]
        if method.score == "random" or (method.bootstrap == "none" and history.rounds == 0):
            draws = generator(self.config.seed, "residency", self.number, round)
            contribution = [torch.rand(number, generator=draws) for number in numbers]
        else:
            if history.prior is None and not history.observed:
                self._bootstrap(history)
            contribution = history.contribution()
        at_least = max(layer.top_k for layer in self.model.layers)
        return select(contribution, self.budget, at_least=at_least)  # type: ignore[return-value]

    def _bootstrap(self, history: ClientHistory) -> None:
        everything = [torch.ones(number, dtype=torch.bool) for number in self.model.num_experts]
        if self.initial is not None:
            load(self.model, self.initial, everything)
        self.model.set_resident(None)
        method, seed = self.config.method, self.config.seed
        bootstrap(
            self.model, self.examples, self.encoder, method, self.config.train.batch_size, history, seed, self.number
        )

    def train(self, history: ClientHistory, resident: list[Tensor], tensors: dict[str, Tensor], round: int) -> Update:
        """Train the resident experts and return what changed."""
        self.model.set_resident(resident)
        load(self.model, tensors, resident)
        on_step = self.on_step
        local = train(
            self.model,
            self.examples,
            self.encoder,
            self.config.train,
            self.config.method,
            history,
            self.activation_budget(),
            self.config.seed,
            self.number,
            self.lr_factor(round),
            None if on_step is None else lambda step, loss: on_step(self.number, step, loss),
        )
        return Update(
            tensors=extract(self.model, local.trained),
            trained=local.trained,
            usage=local.usage,
            importance=local.importance,
            tokens=local.tokens,
            examples=len(self.examples),
            losses=local.losses,
            seconds=local.seconds,
            peak_bytes=sub_model_bytes(self.model, resident) if self.simulated else peak_process_bytes(),
            peak_is_measured=not self.simulated,
        )


def client_app(device_of: Callable[[Context], Device]) -> ClientApp:
    """The ClientApp whose clients `device_of` makes (or keeps ready) from Flower's context."""
    app = ClientApp()

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        device = device_of(context)
        description = Description(
            device.number, device.name, len(device.examples), device.budget, device.model.num_experts
        )
        return Message(describe_reply(description), reply_to=message)

    @app.query("plan")
    def plan(message: Message, context: Context) -> Message:
        device = device_of(context)
        history = _read_history(context, device)
        round = int(facts_of(message)["round"])  # type: ignore[arg-type]
        resident = device.plan(history, round)
        _write_history(context, history)
        return Message(record({"resident": pack_bits(resident)}), reply_to=message)

    @app.train()
    def train_round(message: Message, context: Context) -> Message:
        device = device_of(context)
        history = _read_history(context, device)
        facts = facts_of(message)
        resident = unpack_bits(facts["resident"], device.model.num_experts)
        update = device.train(history, resident, tensors_of(message), int(facts["round"]))  # type: ignore[arg-type]
        _write_history(context, history)
        return Message(train_reply(update), reply_to=message)

    return app


def _read_history(context: Context, device: Device) -> ClientHistory:
    kept = context.state.config_records.get(HISTORY)
    if kept is None:
        return ClientHistory.new(device.model.num_experts)
    blob = kept["blob"]
    assert isinstance(blob, bytes)
    return ClientHistory.from_tensors(read_blob(blob), device.model.num_experts)


def _write_history(context: Context, history: ClientHistory) -> None:
    context.state[HISTORY] = ConfigRecord({"blob": write_blob(history.to_tensors())})
