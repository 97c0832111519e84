"""What the gate (router) of each client counts in the average (equations 18-21).

With S_c = {e : u_c(e) >= tau / E} and S the union of S_c over the clients of the round:

    r(c)     = |S_c ∩ S| / |S|                          (18)  reported, not a factor
    p_c(e)   = u_c(e) * s_c(e)    for e in S_c, else 0  (19)
    alpha(c) = sum_e p_c(e) / |S|                       (20)
    gate     = sum_c alpha(c) gate_c                    (21)

Decision: alpha is normalised over the clients of the round. As printed it does not sum to 1 and would shrink the gate
every round. |S| then cancels, so the weight of one client, `gate_alpha_numerator`, needs no other client: gates stream
through a `MeanAverage`. The fallback for "all alpha are 0" streams too, as a second average with weights |D_c|:

    gate = by_importance.result(previous=by_examples.result(previous=gate))
"""

import torch
from torch import Tensor

from hfedmoe.method.usage import passes


def routing_consistency(usage: Tensor, tau: float) -> Tensor:
    """The share r(c) of all experts in use that client c uses: usage [C, E] -> float32 [C], eq. 18; 0 if S is empty.

    Raises ValueError if tau is negative.
    """
    used = passes(usage, tau)
    return used.sum(-1).float() / used.any(0).sum().clamp_min(1)


def gate_alpha_numerator(usage: Tensor, importance: Tensor, tau: float) -> Tensor:
    """One client's weight for its gate before normalisation, sum_e p_c(e): [E], [E] -> float32 scalar (eq. 19, 20).

    Raises ValueError if tau is negative or the shapes differ.
    """
    return _mass(usage, importance, tau).sum(-1)


def raw_gate_alpha(usage: Tensor, importance: Tensor, tau: float) -> Tensor:
    """The printed alpha, which does not sum to 1: [C, E], [C, E] -> float32 [C], eq. 20; 0 if S is empty.

    Raises ValueError as `gate_alpha_numerator`.
    """
    return gate_alpha_numerator(usage, importance, tau) / passes(usage, tau).any(0).sum().clamp_min(1)


def gate_weights(usage: Tensor, importance: Tensor, tau: float, num_examples: Tensor | None = None) -> Tensor:
    """The weights of all clients' gates, summing to 1: [C, E], [C, E], num_examples [C] -> float32 [C], eq. 21.

    If every alpha is 0 the weights follow `num_examples`, and are uniform without it.

    Raises:
        ValueError: tau is negative, the shapes differ, there is no client, num_examples is negative, or an alpha is
            negative or not finite.
    """
    if usage.dim() != 2 or len(usage) == 0:
        raise ValueError(f"expected usage [C, E] of at least one client, got {tuple(usage.shape)}")
    if num_examples is not None and (num_examples.shape != usage.shape[:1] or (num_examples < 0).any()):
        raise ValueError(f"expected num_examples of {len(usage)} clients, none of them negative")
    alpha = gate_alpha_numerator(usage, importance, tau)
    if not (alpha.isfinite() & (alpha >= 0)).all():
        raise ValueError("usage and importance must be finite and not negative")
    # Decision: normalised over the clients of the round; all-zero alpha falls back to |D_c|.
    if alpha.sum() == 0 and num_examples is not None:
        alpha = num_examples.to(alpha)
    if alpha.sum() == 0:
        alpha = torch.ones_like(alpha)
    return alpha / alpha.sum()


def gate_row_weights(usage: Tensor, importance: Tensor, trained: Tensor, tau: float) -> Tensor:
    """One client's weight for each row of its gate, p_c(e) where it trained e, else 0: three [E] -> float32 [E].

    The rule `gate = "rows"`: row e is averaged, through a `RowAverage`, only over the clients that trained expert e.

    Raises ValueError as `gate_alpha_numerator`.
    """
    return torch.where(trained, _mass(usage, importance, tau), 0.0)


def _mass(usage: Tensor, importance: Tensor, tau: float) -> Tensor:
    """p_c(e) of eq. 19: [..., E] -> float32 [..., E], 0 outside S_c."""
    if usage.shape != importance.shape:
        raise ValueError(f"usage {tuple(usage.shape)} and importance {tuple(importance.shape)} differ in shape")
    product = usage.detach().float() * importance.detach().float()
    return torch.where(passes(usage, tau), product, 0.0)
