"""Every importance score behind one interface: evidence of one batch about one layer -> one number per expert.

Higher is better to keep. Only `ib` is the paper's choice; the others are ablations and rivals:

    ib          I(e) = s(e) - beta * redundancy(e)                 (14)
    importance  s(e)                                               (5)
    frequency   routed(e) / sum_j routed(j)
    random      uniform in [0, 1)
    activation  sum_t g_e(t) * |f_e(x_t)|                          gate weight x norm of the expert's output
    taylor      -sum_t g_e(t) * dL/dg_e(t)                         first-order rise of the loss without the expert

`activation` and `taylor` can be measured only for experts that ran, so they hold NaN elsewhere, and `RunningScore`
takes the mean over the batches in which an expert was observed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

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


Score = Callable[[Evidence, float, float, torch.Generator | None], Tensor]


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


# Decision: rank by I ("ib"); the paper's text also ranks by s, which is "importance" here (the same with beta = 0).
SCORES: dict[str, Score] = {
    "ib": lambda evidence, lam, beta, generator: ib_contribution(evidence.g, lam, beta),
    "importance": lambda evidence, lam, beta, generator: importance(evidence.g, lam),
    "frequency": lambda evidence, lam, beta, generator: _frequency(evidence),
    "random": lambda evidence, lam, beta, generator: _random(evidence, generator),
    "activation": lambda evidence, lam, beta, generator: _measured(evidence, "activation"),
    "taylor": lambda evidence, lam, beta, generator: _measured(evidence, "taylor"),
}
"""Name -> function(evidence, lam, beta, generator) -> float32 [E]."""

NEEDS: dict[str, str | None] = {
    "ib": None,
    "importance": None,
    "frequency": None,
    "random": None,
    "activation": "activation",
    "taylor": "taylor",
}
"""The field of `Evidence` that a score needs beyond the routing, which is always measured."""


def score(
    name: str, evidence: Evidence, lam: float = 0.5, beta: float = 0.5, generator: torch.Generator | None = None
) -> Tensor:
    """The score `name` of every expert of a layer: float32 [E], NaN where it was not measured.

    Raises:
        ValueError: the name is unknown, or the evidence it needs is missing.
    """
    if name not in SCORES:
        raise ValueError(f'score "{name}" is unknown; known: {", ".join(SCORES)}')
    return SCORES[name](evidence, lam, beta, generator)


class RunningMean:
    """Per-expert mean over batches, in which a value that is not finite means "not observed" and changes nothing."""

    def __init__(self, num_experts: int, device: torch.device | str | None = None) -> None:
        self._mean = torch.zeros(num_experts, dtype=torch.float32, device=device)
        self._weight = torch.zeros(num_experts, dtype=torch.float32, device=device)

    def update(self, values: Tensor, weight: float = 1.0) -> None:
        """Fold in one batch: values [E], and what the batch counts (its number of samples for a mean over samples).

        Raises:
            ValueError: wrong shape, or a weight that is not positive.
        """
        if values.shape != self._mean.shape:
            raise ValueError(f"expected {len(self._mean)} values, one per expert, got {tuple(values.shape)}")
        if not 0 < weight < float("inf"):
            raise ValueError(f"weight={weight} is not a positive number")
        values = values.detach().to(self._mean)
        observed = values.isfinite()
        self._weight += observed * weight
        step = (values - self._mean) * (weight / self._weight)
        self._mean += torch.where(observed, step, 0.0)

    def value(self) -> Tensor:
        """float32 [E]; NaN for experts that were never observed."""
        return torch.where(self._weight > 0, self._mean, torch.nan)

    def state(self) -> dict[str, Tensor]:
        """What has to be saved to continue bit for bit: `mean` and `weight`, float32 [E] each."""
        return {"mean": self._mean.clone(), "weight": self._weight.clone()}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        """The inverse of `state`. Raises ValueError if it is not such a state."""
        if set(state) != {"mean", "weight"} or state["mean"].dim() != 1 or state["mean"].shape != state["weight"].shape:
            raise ValueError("the state of a running mean is `mean` [E] and `weight` [E]")
        running = cls(len(state["mean"]), state["mean"].device)
        running._mean.copy_(state["mean"])
        running._weight.copy_(state["weight"])
        return running


class RunningScore(RunningMean):
    """A client's running mean of one score in one layer, with a value for every expert."""

    def value(self) -> Tensor:
        """float32 [E], free of NaN: an expert never observed gets the mean of the observed ones (0 if there are none).

        So it is neither preferred nor ruled out before anything is known about it.
        """
        observed = self._weight > 0
        total = torch.where(observed, self._mean, 0.0).sum()
        return torch.where(observed, self._mean, total / observed.sum().clamp_min(1))
