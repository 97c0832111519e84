"""Which experts are chosen under a budget (equation 15).

    active = argmax  sum_{e in active} I(e)    s.t.  active within the candidates, |active| <= budget    (15)

Experts of one model have equal sizes, so the `budget` best are the exact optimum.

Decision: the budget is filled even with experts whose contribution is negative, which (15) would leave out: the memory
is available, and different scores can be compared only by the order that they give.

Decision: a device has two limits, so there are two choices. `select` is the residency of a round (memory; one budget
over all layers, with a minimum per layer so that every layer still routes, or with `even_shares`). `activation` is the
choice of one batch in one layer (compute), among the resident experts that the batch was routed to.

Decision: the client draws a random order for equal contributions. Without it, the lower layer and then the lower expert
come first, so all clients would choose the same experts among those that none of them has seen.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def select(
    contribution: Sequence[Tensor],
    budget: int,
    at_least: int | Sequence[int] = 0,
    ties: torch.Generator | None = None,
) -> list[Tensor]:
    """`budget` experts over all layers (eq. 15): the best `at_least` of every layer, then the best of the others.

    A budget larger than the number of experts selects all of them.

    Args:
        contribution: [E_l] per layer.
        budget: experts over all layers.
        at_least: experts that every layer gets, one number or one per layer.
        ties: draws the order of equal contributions; None: the lower index first.

    Returns:
        bool [E_l] per layer.

    Raises:
        ValueError: no layers, NaN in the contribution, a negative number, a layer with fewer than `at_least` experts,
            or a budget too small for `at_least` experts in every layer.
    """
    scores = list(contribution)
    if not scores or any(score.dim() != 1 for score in scores):
        raise ValueError("contribution: expected one [E] per layer")
    least = [at_least] * len(scores) if isinstance(at_least, int) else list(at_least)
    if len(least) != len(scores):
        raise ValueError(f"at_least has {len(least)} numbers for {len(scores)} layers")
    if budget < 0 or min(least) < 0:
        raise ValueError(f"budget={budget} and at_least={at_least} must not be negative")
    if sum(least) > budget:
        each = f"{least[0]} experts in each of {len(scores)} layers" if len(set(least)) == 1 else f"{least} experts"
        raise ValueError(f"budget={budget} is too small for {each}: it must be at least {sum(least)}")
    for layer, score in enumerate(scores):
        if score.isnan().any():
            raise ValueError(f"the contribution of layer {layer} contains NaN")
        if len(score) < least[layer]:
            raise ValueError(f"layer {layer} has {len(score)} experts but must get at least {least[layer]}")

    sizes = [len(score) for score in scores]
    every = torch.cat(scores)
    order = None if ties is None else torch.randperm(len(every), generator=ties).to(every.device)
    orders = [None] * len(sizes) if order is None else list(order.split(sizes))
    everyone = [torch.ones_like(score, dtype=torch.bool) for score in scores]
    chosen = torch.cat([_best(*layer) for layer in zip(scores, everyone, orders, least, strict=True)])
    chosen |= _best(every, ~chosen, order, budget - sum(least))
    return list(chosen.split(sizes))


def activation(
    contribution: Tensor, hit: Tensor, resident: Tensor, budget: int | None, ties: Tensor | None = None
) -> Tensor:
    """The experts of one layer that this batch trains: the best `budget` of those hit and resident (eq. 15).

    Runs inside the forward pass: tensor operations only, nothing waits for the device. NaN ranks last.

    Args:
        contribution: [E].
        hit: bool [E], at least one sample of the batch was routed to the expert (the paper's union).
        resident: bool [E].
        budget: experts of this layer; None: no limit.
        ties: int64 [E], equal contributions are taken in the order of these numbers; None: the lower index first.

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
    return _best(score, eligible, ties, budget)


def comparable(contribution: Sequence[Tensor]) -> list[Tensor]:
    """Make scores of different layers comparable: divide each by the mean absolute value of its layer.

    Decision: sums of activations and of gradients grow or fall with depth by orders of magnitude. One budget over all
    layers would follow depth and not the experts, so every layer gets the same mean. The order within a layer stays.

    Args:
        contribution: [E_l] per layer.

    Returns:
        float32 [E_l] per layer; a layer of zeros stays as it is.
    """
    sizes = [score.float().abs().mean() for score in contribution]
    return [
        score.float() / size if size > 0 else score.float() for score, size in zip(contribution, sizes, strict=True)
    ]


def even_shares(num_experts: Sequence[int], budget: int, at_least: int) -> list[int]:
    """The same share of the experts of every layer within a budget over all layers, rounded down.

    Args:
        num_experts: E_l of every layer.
        at_least: experts that every layer gets even if its share is smaller; others then get less.

    Raises:
        ValueError: the budget is too small for `at_least` experts in every layer.
    """
    total = sum(num_experts)
    if budget < at_least * len(num_experts):
        raise ValueError(f"budget={budget} is too small for {at_least} experts in each of {len(num_experts)} layers")
    shares = [max(at_least, min(number, number * budget // total)) for number in num_experts]
    while sum(shares) > budget:
        fullest = max(
            range(len(shares)), key=lambda layer: (shares[layer] > at_least, shares[layer] / num_experts[layer])
        )
        shares[fullest] -= 1
    return shares


def _best(score: Tensor, allowed: Tensor, ties: Tensor | None, number: int) -> Tensor:
    """bool [N]: the `number` highest allowed entries, or all if there are fewer; ties in the order of `ties` [N]."""
    # Stable sorts, the least important key first, so that an allowed -inf still comes before what is not allowed.
    order = torch.arange(len(score), device=score.device) if ties is None else ties.argsort()
    order = order[score[order].argsort(descending=True, stable=True)]
    order = order[allowed[order].to(torch.uint8).argsort(descending=True, stable=True)]
    return torch.zeros_like(allowed).scatter_(0, order[:number], True) & allowed
