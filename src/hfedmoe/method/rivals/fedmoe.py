"""FedMoE (arXiv 2408.11304): a sub-model per client, found by the activation probability of its experts.

This is its first stage. The second, in which the server recommends other sub-models, is `recommend.py`.
"""

import torch
from torch import Tensor

from hfedmoe.method.copies import Copies
from hfedmoe.method.holding import every, gate_by_examples, over_holders
from hfedmoe.method.row import Method, Outlook, Residents, Settings

STEPS = 40
"""Of the bisection; theta is then exact to 1e-12, finer than probabilities in float32."""


def hold_to_threshold(outlook: Outlook, settings: Settings) -> Residents:
    """The largest theta such that in every layer the fewest experts that reach it together fit into the budget.

    An expert's activation probability is the share of the layer's routed tokens. Layers keep different numbers of
    experts, top-k at least.
    """
    if outlook.budget >= sum(outlook.num_experts):
        return every(outlook)
    return to_threshold(outlook.contribution(), outlook.budget, max(outlook.top_k))


def to_threshold(scores: list[Tensor], budget: int, least: int) -> Residents:
    """The experts of `hold_to_threshold`, from scores [E_l] per layer; `least`: experts of every layer."""
    shares = [score / score.sum().clamp_min(1e-12) for score in scores]
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        theta = (low + high) / 2
        if sum(_number(share, theta, least) for share in shares) <= budget:
            low = theta
        else:
            high = theta
    return [_top(share, _number(share, low, least)) for share in shares]


def _number(share: Tensor, theta: float, least: int) -> int:
    """The fewest top experts whose shares add up to theta."""
    sums = share.double().sort(descending=True).values.cumsum(0)
    return max(least, min(len(share), int((sums < theta).sum()) + 1))


def _top(share: Tensor, number: int) -> Tensor:
    keep = torch.zeros(len(share), dtype=torch.bool)
    keep[share.argsort(descending=True, stable=True)[:number]] = True
    return keep


def _rows_over_holders(copies: Copies, settings: Settings) -> Tensor | None:
    return over_holders(copies, settings)


FEDMOE = Method(
    holds="the fewest experts of each layer that reach a share of its routed tokens, the largest that fits its budget",
    trains="what it holds",
    travels="what it holds",
    server="experts and rows of the gate: kept if nobody held them, else mean over holders, weighted by their rows",
    source="arXiv 2408.11304",
    status="full text",
    hold=hold_to_threshold,
    score=lambda settings: "frequency",
    sends="held",
    expert_weight=over_holders,
    gate_weight=gate_by_examples,
    gate_rows=_rows_over_holders,
)
