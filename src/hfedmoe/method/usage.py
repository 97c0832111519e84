"""How much a client uses each expert, and the weight of its copy of the expert (equations 16 and 17).

u_c(e)   = mean over D_c of g(e)                                             (16)
E_e(t+1) = sum_c w_c(e) E_e(c) / sum_c w_c(e)                                (17)
w_c(e)   = |D_c| * 1[u_c(e) >= tau / E] * 1[c trained e]      rule "samples", the paper's
           tokens_c(e) * (the same)                           rule "tokens"
           |D_c| * s_c(e) * (the same)                        rule "importance"
           |D_c|                                              rule "all", eq. 17 off

With "all", a client counts whether it trained the expert or not: one that did not counts with the value that the round
began with, as the stale copies of plain federated averaging do.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hfedmoe.method.copies import Copies
from hfedmoe.method.importance import cumulative
from hfedmoe.method.running import RunningMean


class ClientUsage(RunningMean):
    """The usage u_c of a layer's experts over the samples that a client has seen in a round (eq. 16)."""

    def add(self, g: Tensor) -> None:
        """Add a batch: routing probabilities [B, E] of its samples; B may be 0."""
        if len(g):
            self.update(cumulative(g), weight=len(g))

    def value(self) -> Tensor:
        """float32 [E]; 0 if no sample was seen."""
        return super().value().nan_to_num(0.0)


class FederationUsage:
    """Mean usage of every expert over the clients of all rounds so far, weighted by |D_c|.

    Sums are float64 and always in the same order, so that a resumed run has the same bits.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._weight = 0.0

    def add(self, usage: Tensor, examples: int) -> None:
        """Add one client's round: u_c float32 [sum E_l], measured on `examples` rows."""
        part = usage.double() * examples
        self._sum = part if self._sum is None else self._sum + part
        self._weight += examples

    def value(self) -> Tensor | None:
        """float32 [sum E_l]; None before anything was added."""
        return None if self._sum is None else (self._sum / self._weight).float()


class HeldCounts:
    """How many times clients held each expert, over all rounds so far."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def add(self, held: Tensor) -> None:
        """Add one client's round: bool [sum E_l]."""
        self._sum = held.float() if self._sum is None else self._sum + held.float()

    def value(self) -> Tensor | None:
        """float32 [sum E_l]; None before anything was added."""
        return self._sum


def passes(usage: Tensor, tau: float) -> Tensor:
    """Which experts a client uses enough to count, the set S_c: usage [..., E] -> bool [..., E].

    Raises ValueError if tau is negative.
    """
    if not tau >= 0:
        raise ValueError(f"tau={tau} must not be negative")
    # Decision: tau is a multiple of the uniform share 1/E, so that one value fits models of any E.
    return usage.detach().float() >= tau / usage.shape[-1]


EXPERT_WEIGHTS: dict[str, Callable[[Copies], Tensor]] = {
    "samples": lambda copies: torch.full_like(copies.usage, copies.examples, dtype=torch.float32),
    "tokens": lambda copies: copies.tokens.detach().float(),
    "importance": lambda copies: copies.examples * copies.importance.detach().float(),
    "all": lambda copies: torch.full_like(copies.usage, copies.examples, dtype=torch.float32),
}
"""The rules for w_c(e) of eq. 17 by name, before the conditions: copies of [..., E] -> float32 [..., E]."""


def expert_weights(rule: str, copies: Copies, tau: float) -> Tensor:
    """The weight w_c(e) of one client's copy of every expert, eq. 17.

    Args:
        rule: a name in `EXPERT_WEIGHTS`.
        copies: of [..., E].
        tau: threshold as a multiple of 1/E.

    Returns:
        float32 [..., E], 0 where the client takes no part.

    Raises:
        ValueError: unknown rule or negative tau.
    """
    if rule not in EXPERT_WEIGHTS:
        raise ValueError(f'expert rule "{rule}" is unknown; known: {", ".join(EXPERT_WEIGHTS)}')
    # Decision: usage does not prove training, so a copy needs both. An expert without copies keeps its global value.
    counts = copies.trained if rule == "all" else copies.trained & passes(copies.usage, tau)
    return torch.where(counts, EXPERT_WEIGHTS[rule](copies), 0.0)


def kept_weights(rule: str, copies: Copies) -> Tensor | None:
    """What one client counts for the value that the round began with: float32 [..., E]; None: nothing."""
    return torch.where(copies.trained, 0.0, EXPERT_WEIGHTS[rule](copies)) if rule == "all" else None
