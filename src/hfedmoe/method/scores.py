"""All importance scores, with one interface: evidence of one batch about one layer -> one number per expert.

Higher means better to keep. `ib` is the paper's choice, the others are for comparison:

    ib          I(e) = s(e) - beta * redundancy(e)                 (14)
    importance  s(e)                                               (5)
    frequency   routed(e) / sum_j routed(j)
    random      uniform in [0, 1)
    activation  sum_t g_e(t) * |f_e(x_t)|                          gate weight x norm of the expert's output
    taylor      -sum_t g_e(t) * dL/dg_e(t)                         first-order rise of the loss without the expert

A new score is one row of `SCORES`: nothing else names it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hfedmoe.method.importance import ib_contribution, importance


@dataclass
class Evidence:
    """What one batch shows about one layer."""

    g: Tensor
    """[B, E] routing probabilities of the samples, from the unmasked router."""
    routed: Tensor
    """float32 [E], tokens whose unmasked top-k contains the expert."""
    activation: Tensor | None = None
    """[E], sum over tokens of gate weight x norm of the expert's output; NaN: not measured."""
    taylor: Tensor | None = None
    """[E], minus the sum over tokens of g_e * dL/dg_e; NaN: not measured."""


Measure = Callable[[Evidence, float, float, torch.Generator | None], Tensor]
"""(evidence, lam, beta, generator) -> float32 [E], NaN where the batch does not show it."""


@dataclass(frozen=True)
class Score:
    """One score."""

    about: str
    """One sentence for people."""
    measure: Measure
    needs: str | None = None
    """The field of `Evidence` that it needs in addition to the routing, which is always measured."""
    needs_backward: bool = False
    """Whether it needs a backward pass. A client's first pass has none, so it starts with `ib` as a prior."""
    drawn: bool = False
    """Whether it is a random number, drawn when it is needed and never remembered."""
    by_layer: bool = False
    """Whether its size depends on the layer, so that only experts of one layer can be compared directly."""

    @property
    def within_pass(self) -> bool:
        """Whether it needs only the router, so that a batch can choose by its own score during the forward pass."""
        return self.needs is None


def _frequency(evidence: Evidence) -> Tensor:
    routed = evidence.routed.float()
    return routed / routed.sum().clamp_min(1.0)  # counts: the sum is 0 or at least 1


def _random(evidence: Evidence, generator: torch.Generator | None) -> Tensor:
    device = evidence.g.device if generator is None else generator.device
    return torch.rand(evidence.g.shape[-1], generator=generator, device=device).to(evidence.g.device)


def _measured(evidence: Evidence, what: str) -> Tensor:
    values: Tensor | None = getattr(evidence, what)
    if values is None:
        raise ValueError(f'score "{what}" needs evidence of {what}, and none was measured')
    return values.detach().float()


SCORES: dict[str, Score] = {
    # Decision: rank by I. In one place the paper ranks by s, which is "importance" here (beta = 0).
    "ib": Score("importance less redundancy (eq. 14)", lambda e, lam, beta, _: ib_contribution(e.g, lam, beta)),
    "importance": Score("mean and largest routing probability (eq. 5)", lambda e, lam, *_: importance(e.g, lam)),
    "frequency": Score("share of the tokens routed to it", lambda e, *_: _frequency(e)),
    "random": Score("a random number", lambda e, lam, beta, draws: _random(e, draws), drawn=True),
    "activation": Score(
        "gate weight times norm of its output",
        lambda e, *_: _measured(e, "activation"),
        needs="activation",
        by_layer=True,
    ),
    "taylor": Score(
        "first-order rise of the loss without it",
        lambda e, *_: _measured(e, "taylor"),
        needs="taylor",
        needs_backward=True,
        by_layer=True,
    ),
}
"""All scores by name."""


def score(
    name: str, evidence: Evidence, lam: float = 0.5, beta: float = 0.5, generator: torch.Generator | None = None
) -> Tensor:
    """The score `name` of every expert of a layer: float32 [E], NaN where it was not measured.

    Raises:
        ValueError: the name is unknown, or the evidence it needs is missing.
    """
    if name not in SCORES:
        raise ValueError(f'score "{name}" is unknown; known: {", ".join(SCORES)}')
    return SCORES[name].measure(evidence, lam, beta, generator)
