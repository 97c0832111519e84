"""Which experts are chosen under a budget (equation 15).

    active = argmax  sum_{e in active} I(e)    s.t.  active within the candidates, |active| <= budget    (15)

Experts of one model have equal sizes, so taking the `budget` best is the exact optimum. Ties go to the lower layer,
then to the lower expert.

Decision: the budget is filled even with experts whose contribution is negative, which (15) would leave out: the memory
is there, and only the order of scores is comparable between one score and another.

Decision: a device has two limits, hence two choices. `select` is the residency of a round (memory; one budget over all
layers, a minimum per layer so that every layer still routes); `activation` is the choice of one batch in one layer
(compute), among the resident experts that the batch was routed to.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def select(
    contribution: Tensor | Sequence[Tensor],
    budget: int,
    candidates: Tensor | Sequence[Tensor] | None = None,
    at_least: int = 0,
) -> Tensor | list[Tensor]:
    """The best `budget` experts over all layers, of which the best `at_least` of every layer come first (eq. 15).

    A budget larger than the number of candidates selects all of them.

    Args:
        contribution: [L, E], or one [E_l] per layer.
        budget: experts over all layers.
        candidates: bool, same structure; only these may be chosen. None: all.
        at_least: experts that every layer gets.

    Returns:
        bool of the same structure as `contribution`.

    Raises:
        ValueError: NaN in the contribution, structures that differ, a negative number, a layer with fewer than
            `at_least` candidates, or a budget too small for `at_least` experts in every layer.
    """
    scores = _layers(contribution, "contribution")
    allowed = [torch.ones_like(s, dtype=torch.bool) for s in scores]
    if candidates is not None:
        allowed = _layers(candidates, "candidates")
        if [a.shape for a in allowed] != [s.shape for s in scores]:
            raise ValueError("candidates do not have the layers and experts of the contribution")
    if budget < 0 or at_least < 0:
        raise ValueError(f"budget={budget} and at_least={at_least} must not be negative")
    if len(scores) * at_least > budget:
        raise ValueError(
            f"budget={budget} is too small for {at_least} experts in each of {len(scores)} layers: "
            f"it must be at least {len(scores) * at_least}"
        )
    for layer, (score, allow) in enumerate(zip(scores, allowed, strict=True)):
        if score.isnan().any():
            raise ValueError(f"the contribution of layer {layer} contains NaN")
        if allow.sum() < at_least:
            raise ValueError(
                f"layer {layer} has {int(allow.sum())} candidates but must get at least {at_least} experts"
            )

    chosen = torch.cat([_best(score, allow, at_least) for score, allow in zip(scores, allowed, strict=True)])
    left = budget - len(scores) * at_least
    chosen |= _best(torch.cat(scores), torch.cat(allowed) & ~chosen, left)
    result = list(chosen.split([len(score) for score in scores]))
    return torch.stack(result) if isinstance(contribution, Tensor) else result


def activation(contribution: Tensor, hit: Tensor, resident: Tensor, budget: int | None) -> Tensor:
    """The experts of one layer that this batch trains: the best `budget` of those hit and resident (eq. 15).

    Runs inside the forward pass: tensor operations only, nothing waits for the device. NaN ranks last.

    Args:
        contribution: [E].
        hit: bool [E], at least one sample of the batch was routed to the expert (the paper's union).
        resident: bool [E].
        budget: experts of this layer; None: no limit.

    Returns:
        bool [E].

    Raises:
        ValueError: shapes that differ, or a negative budget.
    """
    if contribution.dim() != 1 or hit.shape != contribution.shape or resident.shape != contribution.shape:
        raise ValueError(
            f"expected contribution, hit and resident [E], got {tuple(contribution.shape)}, {tuple(hit.shape)} "
            f"and {tuple(resident.shape)}"
        )
    eligible = hit & resident
    if budget is None:
        return eligible
    if budget < 0:
        raise ValueError(f"budget={budget} must not be negative")
    score = contribution.detach().float().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return _best(score, eligible, budget)


def _best(score: Tensor, allowed: Tensor, number: int) -> Tensor:
    """bool [N]: the `number` highest allowed entries, fewer if there are not so many; ties go to the lower index."""
    # Two stable sorts, so that an allowed -inf still comes before everything that is not allowed.
    order = score.argsort(descending=True, stable=True)
    order = order[allowed[order].to(torch.uint8).argsort(descending=True, stable=True)]
    return torch.zeros_like(allowed).scatter_(0, order[:number], True) & allowed


def _layers(values: Tensor | Sequence[Tensor], name: str) -> list[Tensor]:
    layers = list(values) if not isinstance(values, Tensor) or values.dim() == 2 else []
    if not layers or any(layer.dim() != 1 for layer in layers):
        raise ValueError(f"{name}: expected [L, E], or one [E] per layer")
    return layers
