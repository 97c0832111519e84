"""A method is a row of choices: what a client holds, trains and sends, and the weight of its copies on the server.

A new method is one row of `METHODS`. Client, server and messages read every choice from the row; they know no method by
name. All functions get the section [method] of the configuration as `settings`, so a row may have its own constants.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from hfedmoe.method.copies import Copies
from hfedmoe.method.gates import gate_mass, gate_row_weights
from hfedmoe.method.scores import SCORES
from hfedmoe.method.selection import activation, comparable, select
from hfedmoe.method.usage import expert_weights


class Settings(Protocol):
    """Section [method] of a configuration, as far as the rows here read it."""

    @property
    def score(self) -> str: ...
    @property
    def lam(self) -> float: ...
    @property
    def beta(self) -> float: ...
    @property
    def tau(self) -> float: ...
    @property
    def expert_weight(self) -> str: ...
    @property
    def gate(self) -> str: ...


class CannotHoldError(Exception):
    """A client does not have enough room for the experts that the method holds; the text says how much it needs."""


@dataclass
class Outlook:
    """What a client knows when it is asked which experts it will hold in a round."""

    num_experts: list[int]
    """E_l of every layer."""
    top_k: list[int]
    """Per layer."""
    budget: int
    """Experts over all layers that the device has room for."""
    contribution: Callable[[], list[Tensor]]
    """The client's scores, [E_l] per layer; the first call may take a pass over its data."""
    draws: torch.Generator
    """The client's own random numbers of the round."""


@dataclass
class Wish:
    """What a server that plans knows about a client: as `Outlook`, with the scores that the client sent."""

    num_experts: list[int]
    top_k: list[int]
    budget: int
    examples: int
    contribution: list[Tensor]


Residents = list[Tensor]
"""bool [E_l] per layer."""


@dataclass(frozen=True)
class Method:
    """One method. Shapes: `E` experts of a layer, `[..., E]` one layer or several of equal size."""

    about: str
    """What a client holds, trains and sends, in one sentence."""
    source: str
    """Where it is described."""
    hold: Callable[[Outlook, Settings], Residents]
    """The experts that a client holds in a round, at least top-k in every layer. Raises CannotHoldError."""
    expert_weight: Callable[[Copies, Settings], Tensor]
    """The weights of a client's copies of the experts: float32 [..., E], 0 for copies that are not used."""
    gate_weight: Callable[[Copies, Settings], Tensor]
    """The weight of a client's gates: float32 [...]; if it is 0 for all clients, |D_c| is used."""
    gate_rows: Callable[[Copies, Settings], Tensor | None] = lambda copies, settings: None
    """The weight of each row of its gates: float32 [..., E]; None: rows have no weights of their own."""
    sends: Literal["trained", "held"] = "trained"
    """The experts whose rows a client sends back."""
    train: Callable[[Tensor, Tensor, Tensor, int | None, Tensor | None], Tensor] | None = None
    """Which experts a batch trains under an activation budget, as `selection.activation`; None: all that it hits."""
    score: Callable[[Settings], str | None] = lambda settings: None
    """The name of the score that ranks the experts; None: experts are not ranked, and clients measure no score."""
    local_term: Callable[[Sequence[Tensor], Sequence[Tensor], Settings], Tensor] | None = None
    """Added to the local loss: (trained tensors, their values at the start of the round, settings) -> scalar."""
    assign: Callable[[list[Wish], Settings], list[Residents]] | None = None
    """The server's plan: what each client holds, from all their wishes. Then `hold` is not called."""


def hold_best(outlook: Outlook, settings: Settings) -> Residents:
    """The experts with the highest scores within the budget, at least top-k in every layer (eq. 15)."""
    if outlook.budget >= sum(outlook.num_experts):
        return hold_all(outlook, settings)
    row = SCORES[settings.score]
    if row.drawn:
        contribution = [torch.rand(number, generator=outlook.draws) for number in outlook.num_experts]
    else:
        contribution = outlook.contribution()
    if row.by_layer:
        contribution = comparable(contribution)
    return select(contribution, outlook.budget, at_least=max(outlook.top_k), ties=outlook.draws)


def hold_all(outlook: Outlook, settings: Settings) -> Residents:
    """Every expert. Raises CannotHoldError on a device that has no room for all."""
    total = sum(outlook.num_experts)
    if outlook.budget < total:
        raise CannotHoldError(f"it has room for {outlook.budget} of the {total} experts that the method holds")
    return [torch.ones(number, dtype=torch.bool) for number in outlook.num_experts]


def by_examples(copies: Copies) -> Tensor:
    """|D_c| for each layer: copies of [..., E] -> float32 [...]."""
    return torch.full(copies.usage.shape[:-1], float(copies.examples))


def _mean_over_holders(copies: Copies, settings: Settings) -> Tensor:
    return torch.where(copies.held, float(copies.examples), 0.0)


def _rule_for_experts(copies: Copies, settings: Settings) -> Tensor:
    return expert_weights(settings.expert_weight, copies, settings.tau)


@dataclass(frozen=True)
class GateRule:
    """One rule for the gates of `hfedmoe`."""

    weight: Callable[[Copies, float], Tensor]
    """(copies, tau) -> float32 [...]."""
    rows: Callable[[Copies, float], Tensor] | None = None
    """(copies, tau) -> float32 [..., E]; None: all rows have the weight of the gate."""


GATES: dict[str, GateRule] = {
    "importance": GateRule(gate_mass),
    "rows": GateRule(gate_mass, gate_row_weights),
    "fedavg": GateRule(lambda copies, tau: by_examples(copies)),
}
"""The rules for gates by name (eq. 21 and its alternatives)."""


def _rule_for_rows(copies: Copies, settings: Settings) -> Tensor | None:
    rows = GATES[settings.gate].rows
    return None if rows is None else rows(copies, settings.tau)


METHODS: dict[str, Method] = {
    "hfedmoe": Method(
        about="holds the experts that are worth most to it within its budget; trains and sends those its data reach",
        source="arXiv 2601.00583",
        hold=hold_best,
        train=activation,
        score=lambda settings: settings.score,
        expert_weight=_rule_for_experts,
        gate_weight=lambda copies, settings: GATES[settings.gate].weight(copies, settings.tau),
        gate_rows=_rule_for_rows,
    ),
    "fedavg": Method(
        about="holds, trains and sends everything; a client without room for all of it is left out",
        source="arXiv 1602.05629",
        hold=hold_all,
        sends="held",
        expert_weight=_mean_over_holders,
        gate_weight=lambda copies, settings: by_examples(copies),
    ),
}
"""All methods by name, for `method.name`."""
