"""All importance scores, with one interface: evidence of one batch about one layer -> one number per expert.

Higher means better to keep. `ib` is the paper's choice, the others are for comparison:

    ib          I(e) = s(e) - beta * redundancy(e)                 (14)
    importance  s(e)                                               (5)
    frequency   routed(e) / sum_j routed(j)
    random      uniform in [0, 1)
    activation  sum_t g_e(t) * |f_e(x_t)|                          gate weight x norm of the expert's output
    gated2      sum_t (g_e(t) * |f_e(x_t)|)^2
    reap        activation / number of tokens                      REAP: the mean where `activation` is the sum
    taylor      -sum_t g_e(t) * dL/dg_e(t)                         first-order rise of the loss without the expert
    ghost       sum_t (g_e(t) * |dL/dy(t)| * |a_e(t)|)^2           what training the expert can gain, to first order
    utility     sqrt(ghost * number of tokens)                     Flux: tokens x root mean square of their gradients

Sums are over the tokens t that the expert works on; f_e is its output, a_e the input of its down projection, y the
layer's output. A term of `ghost` is the squared norm of one token's gradient of the down projection. It needs no
gradient of the expert itself, so it is also known for experts that a batch does not train.

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
    """[E], sum over tokens of gate weight x norm of the expert's output; NaN: not measured. `squares` is measured with
    it, and `processed` always."""
    taylor: Tensor | None = None
    """[E], minus the sum over tokens of g_e * dL/dg_e; NaN: not measured."""
    ghost: Tensor | None = None
    """[E], sum over tokens of the squared norm of the token's gradient of the down projection; NaN: not measured."""
    squares: Tensor | None = None
    """[E], as `activation`, with each token's term squared."""
    processed: Tensor | None = None
    """float32 [E], tokens that the expert worked on: the number of terms of these sums."""


Measure = Callable[[Evidence, float, float, torch.Generator | None], Tensor]
"""(evidence, lam, beta, generator) -> float32 [E], NaN where the batch does not show it."""


@dataclass(frozen=True)
class Score:
    """One score."""

    about: str
    """One sentence for people."""
    measure: Measure
    needs: str | None = None
    """The field of `Evidence` that must be measured in addition to the routing, which always is."""
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
    assert values is not None
    return values.detach().float()


def _reap(evidence: Evidence) -> Tensor:
    # Decision: an expert without a token in the batch counts 0 and not as unseen, or it would be ranked like the mean.
    return _measured(evidence, "activation") / _measured(evidence, "processed").clamp_min(1.0)


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
    "gated2": Score(
        "as activation, each token's term squared",
        lambda e, *_: _measured(e, "squares"),
        needs="activation",
        by_layer=True,
    ),
    "reap": Score(
        "mean of gate weight times norm of its output", lambda e, *_: _reap(e), needs="activation", by_layer=True
    ),
    "taylor": Score(
        "first-order rise of the loss without it",
        lambda e, *_: _measured(e, "taylor"),
        needs="taylor",
        needs_backward=True,
        by_layer=True,
    ),
    "ghost": Score(
        "squared gradients of its down projection",
        lambda e, *_: _measured(e, "ghost"),
        needs="ghost",
        needs_backward=True,
        by_layer=True,
    ),
    "utility": Score(
        "tokens times root mean square of their gradients of its down projection",
        lambda e, *_: (_measured(e, "ghost") * _measured(e, "processed")).sqrt(),
        needs="ghost",
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
    row = SCORES[name]
    if row.needs is not None and getattr(evidence, row.needs) is None:
        raise ValueError(f'score "{name}" needs evidence of {row.needs}, and none was measured')
    return row.measure(evidence, lam, beta, generator)
