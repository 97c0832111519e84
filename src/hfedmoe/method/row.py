"""What a method is: a row of choices that client, server and messages take everything from.

They know no method by name. All functions take the section [method] of the configuration as `settings`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from hfedmoe.method.copies import Copies


class Settings(Protocol):
    """Section [method] of a configuration, as far as rows read it."""

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
    @property
    def options(self) -> Mapping[str, float]: ...
    @property
    def residency(self) -> str: ...
    @property
    def layers(self) -> str: ...


@dataclass(frozen=True)
class Option:
    """A number of one method's own, set by `method.options`."""

    name: str
    usual: float
    about: str
    low: float = 0.0
    high: float = float("inf")

    def of(self, settings: Settings) -> float:
        """Its value in a configuration."""
        return settings.options.get(self.name, self.usual)


class CannotHoldError(Exception):
    """A client has not enough room for what the method wants it to hold; the text says how much it would need."""


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
    progress: float = 0.0
    """How far the run is: 0 in the first round, 1 in the last."""


Residents = list[Tensor]
"""bool [E_l] per layer."""


@dataclass
class Past:
    """What a server that plans remembers of a client's part in a round."""

    loss: float
    """Of its last step."""
    held: Residents


@dataclass
class Wish:
    """What a server that plans knows of a client: as `Outlook`, with the scores that the client sent."""

    num_experts: list[int]
    top_k: list[int]
    budget: int
    examples: int
    contribution: list[Tensor]
    past: list[Past] = field(default_factory=list)
    """Of the last rounds in which it took part (`PAST` at most), the latest last."""


PAST = 8

Kind = Literal["router", "experts", "shared", "scale", "own"]
"""Kinds of trained tensors, as the names under which they are sent begin."""
EVERYTHING: frozenset[Kind] = frozenset(("router", "experts", "shared", "scale", "own"))


@dataclass(frozen=True)
class Method:
    """One method. Shapes: `E` experts of a layer, `[..., E]` one layer or more, `N` numbers of an expert."""

    holds: str
    """What a client holds, in a few words for people; `trains`, `travels` and `server` likewise."""
    trains: str
    travels: str
    """What it sends."""
    server: str
    """What the server makes of it."""
    source: str
    """Where it is described."""
    status: Literal["full text", "secondary", "abstract", "bound", "own"]
    """What it was implemented from; "bound": no method, but a limit to compare methods with; "own": ours."""
    hold: Callable[[Outlook, Settings], Residents]
    """The experts that a client holds in a round, top-k at least in every layer. Raises CannotHoldError."""
    expert_weight: Callable[[Copies, Settings], Tensor]
    """What a client's copies of the experts count: float32 [..., E], 0 where they do not."""
    gate_weight: Callable[[Copies, Settings], Tensor]
    """What a client's gates count: float32 [...]; where all clients' are 0, gates count |D_c|."""
    gate_rows: Callable[[Copies, Settings], Tensor | None] = lambda copies, settings: None
    """What each row of its gates counts, where rows count by themselves: float32 [..., E]."""
    kept_weight: Callable[[Copies, Settings], Tensor | None] = lambda copies, settings: None
    """What a client counts for the experts as the round began: float32 [..., E], 0 where it sends a copy; None:
    nothing. It is for copies that are averaged one client at a time, and not by their products."""
    gate_as_printed: Callable[[Settings], bool] = lambda settings: False
    """Whether gates are sum_c alpha(c) gate_c with alpha as in eq. 20, which does not sum to 1."""
    sends: Literal["trained", "held"] = "trained"
    """The experts whose rows a client sends back."""
    private: frozenset[Kind] = frozenset()
    """Kinds of trained tensors that never leave the client, which keeps its own from round to round."""
    train: Callable[[Tensor, Tensor, Tensor, int | None, Tensor | None], Tensor] | None = None
    """Which experts a batch trains under an activation budget, as `selection.activation`; None: all that it hits."""
    score: Callable[[Settings], str | None] = lambda settings: None
    """The name of the score that it ranks experts by; None: it ranks none, and clients measure none."""
    local_term: Callable[[Sequence[Tensor], Sequence[Tensor], Settings], Tensor] | None = None
    """Added to the local loss: (trained tensors, the same as the round began, settings) -> scalar."""
    routing_term: Callable[[Sequence[Tensor], Sequence[Tensor], Settings], Tensor] | None = None
    """Added to the local loss: (mean routing probabilities of the batch [E] per layer, with gradient; the federation's
    usage [E] per layer, settings) -> scalar."""
    label_correction: Callable[[Settings], float] | None = None
    """Strength with which the local loss is corrected for the client's label frequencies, as `train.logit_adjustment`,
    which replaces it where it is set. It applies where labels differ in their first token."""
    combine: Callable[[Tensor, Tensor, Settings], Tensor] | None = None
    """Makes one update of an expert from all of a round at once: (changes [C, N], weights [C], settings) -> change [N].
    Without it copies are averaged by weight, one client at a time."""
    server_step: Callable[[Settings], float] = lambda settings: 1.0
    """How far the server goes towards the clients' mean: new = old + step (mean - old); 1 takes the mean as it is."""
    begin: Callable[[Tensor, Tensor, Tensor, Settings], Tensor] | None = None
    """Where a client begins, if it keeps something back: (received [N], what it began with the last time that it held
    the expert [N], what it ended with [N], settings) -> [N]."""
    assign: Callable[[list[Wish], Tensor, Settings], list[Residents]] | None = None
    """The server's plan: what each client holds, from all their wishes and how often each expert was held so far, over
    all clients and rounds, float32 [sum E_l]. Then `hold` is not asked."""
    experts_per_token: Callable[[float, int], int] | None = None
    """The experts that work on a token of a client: (share of all experts in its budget, the model's top-k) -> 1 to
    top-k. The client then also trains a scale of each layer's experts (kind "scale")."""
    rank: Callable[[float, int], int] | None = None
    """The rank of a client's LoRA pairs: (share of all experts in its budget, the configured rank) -> 1 to that rank.
    Only so many components of each pair of the experts travel, and all others are 0 on the client."""
    averages_products: bool = False
    """Whether LoRA pairs are averaged by their products, as with `train.lora = "exact"`, which then need not be set."""
    needs_size: bool = False
    """Whether copies are weighed by the norm of their LoRA products (`Copies.size`)."""
    own: Literal["copy", "graft"] | None = None
    """Experts that a client has for itself beside those of each layer, and a gate of its own that mixes both (kind
    "own"): a "copy" of what is trained of all experts, or a "graft", one expert that begins as the layer's best by the
    client's score. Until a client begins with them, they do nothing. None: there are none."""
    frozen_experts: bool = False
    """Whether the layer's experts are never trained, whatever train.experts says."""
    merged: Callable[[list[int], int, Settings], list[int]] | None = None
    """How many merged experts of each layer stand in for those that a client does not hold: (E_l of every layer, the
    client's budget, settings) -> numbers; they count in the budget. A client then gets the trained tensors of all
    experts, to merge them, and holds one expert at least in every layer. None: no token goes to absent experts."""
    unlimited: bool = False
    """Whether clients' budgets are ignored."""
    pooled: bool = False
    """Whether one client has all rows, and takes as many steps as all clients together would."""
    options: tuple[Option, ...] = ()
    """Numbers of its own."""

    def ignores_budgets(self, settings: Settings) -> bool:
        """Whether clients hold experts without regard to their budgets."""
        return self.unlimited or settings.residency == "all"

    def trained_experts(self, experts: str) -> str:
        """How experts are trained where `train.experts` is `experts`: "lora", "full" or "frozen"."""
        return "frozen" if self.frozen_experts else experts

    def at_least(self, top_k: Sequence[int]) -> list[int]:
        """Experts that a client holds at least in every layer of a model with this top-k."""
        return list(top_k) if self.merged is None else [1] * len(top_k)

    @property
    def changes_model(self) -> bool:
        """Whether clients train a model with other parts than with most methods."""
        return self.own is not None or self.frozen_experts or self.experts_per_token is not None

    @property
    def no_own_model(self) -> str:
        """Why clients have no model of their own that they could measure or train further; empty: they have one."""
        if self.pooled:
            return "there is one client with the rows of all"
        if self.merged is not None:
            return "merged experts stand in for those that a client does not hold, and are no model that it could keep"
        return "its clients train parts that no exported model has" if self.changes_model else ""

    @property
    def limits_otherwise(self) -> bool:
        """Whether budgets limit something else than the experts that clients hold."""
        return self.experts_per_token is not None or self.rank is not None

    def exact_lora(self, lora: str) -> bool:
        """Whether LoRA pairs are averaged by their products, where `train.lora` is `lora`."""
        return self.averages_products or lora == "exact"

    def problem_with(self, experts: str, lora: str) -> str | None:
        """Why the method cannot train with these `train.experts` and `train.lora`; None: it can."""
        both_factors = self.rank is not None or self.averages_products or self.needs_size
        if experts != "lora" and (both_factors or self.own == "copy"):
            return f'it needs LoRA pairs of the experts: set train.experts = "lora" (it is "{experts}")'
        if lora == "freeze_a" and both_factors:
            return 'it changes both factors of LoRA pairs: set train.lora = "factors" (it is "freeze_a")'
        return None

    @property
    def needs_usage(self) -> bool:
        """Whether clients are told the federation's usage of every round."""
        return self.routing_term is not None
