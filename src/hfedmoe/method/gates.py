"""The weight of each client's gate (router) in the average (equations 18-21).

With S_c = {e : u_c(e) >= tau / E} and S the union of S_c over the clients of the round:

    r(c)     = |S_c ∩ S| / |S|                          (18)  reported, not a factor
    p_c(e)   = u_c(e) * s_c(e)    for e in S_c, else 0  (19)
    alpha(c) = sum_e p_c(e) / |S|                       (20)
    gate     = sum_c alpha(c) gate_c                    (21)

Decision: alpha is normalised over the clients of the round. As printed, it does not sum to 1 and would shrink the gate
every round. |S| then cancels, so the weight of one client, `gate_mass`, needs no other client, and gates can be
averaged one client at a time. Where every alpha is 0 the weights are |D_c|.
"""

import torch
from torch import Tensor

from hfedmoe.method.averaging import MeanAverage
from hfedmoe.method.copies import Copies
from hfedmoe.method.usage import passes


class RoutingConsistency:
    """r(c) of eq. 18 for clients that are added one at a time: S is known only after the last one.

    Args:
        num_experts: E_l of every layer.
        tau: threshold as a multiple of 1/E.
    """

    def __init__(self, num_experts: list[int], tau: float) -> None:
        self._tau = tau
        self._union = [torch.zeros(number, dtype=torch.bool) for number in num_experts]

    def add(self, usage: list[Tensor]) -> list[int]:
        """Add a client's usage, [E] per layer. Returns |S_c| of every layer, which `value` takes later."""
        own = [passes(layer, self._tau) for layer in usage]
        for union, used in zip(self._union, own, strict=True):
            union |= used
        return [int(used.sum()) for used in own]

    def value(self, counts: list[int]) -> float:
        """r(c), the mean over the layers, from |S_c| of every layer; S_c is a subset of S, so this is enough."""
        in_use = torch.tensor([int(union.sum()) for union in self._union]).clamp_min(1).float()
        return (torch.tensor(counts) / in_use).mean().item()


class GateAverage:
    """The mean of a tensor weighted by alpha (eq. 21), or by |D_c| if every alpha is 0."""

    def __init__(self) -> None:
        self._by_alpha = MeanAverage()
        self._by_examples: MeanAverage | None = MeanAverage()
        """None once a client with alpha > 0 was added."""

    def add(self, tensor: Tensor, alpha: float, examples: int) -> None:
        """Add one client's tensor [...]. It must be finite, and the numbers not negative."""
        if alpha > 0:
            self._by_alpha.add(tensor, alpha, checked=True)
            self._by_examples = None
        elif self._by_examples is not None:
            self._by_examples.add(tensor, examples, checked=True)

    def merge(self, other: "GateAverage") -> None:
        """Add all clients of another average (`MeanAverage.merge`)."""
        self._by_alpha.merge(other._by_alpha)
        if other._by_examples is None:
            self._by_examples = None
        elif self._by_examples is not None:
            self._by_examples.merge(other._by_examples)

    def result(self, previous: Tensor) -> Tensor:
        """The mean in the dtype of `previous` [...]; `previous` bit for bit if all weights are 0."""
        mean = self._by_alpha if self._by_examples is None else self._by_examples
        return mean.result(previous)


def gate_mass(copies: Copies, tau: float) -> Tensor:
    """One client's weight for its gate before normalisation, sum_e p_c(e) (eq. 19, 20): [..., E] -> float32 [...].

    Raises ValueError if tau is negative.
    """
    return _mass(copies, tau).sum(-1)


def gate_row_weights(copies: Copies, tau: float) -> Tensor:
    """One client's weight for each row of its gate, p_c(e) where it trained e, else 0: [..., E] -> float32 [..., E].

    For the rule `gate = "rows"`: row e is averaged only over the clients that trained expert e.

    Raises ValueError if tau is negative.
    """
    return torch.where(copies.trained, _mass(copies, tau), 0.0)


def _mass(copies: Copies, tau: float) -> Tensor:
    """p_c(e) of eq. 19: float32 [..., E], 0 outside S_c."""
    product = copies.usage.detach().float() * copies.importance.detach().float()
    return torch.where(passes(copies.usage, tau), product, 0.0)
