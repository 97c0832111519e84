"""LoRA whose rank follows a client's budget: HetLoRA (arXiv 2401.06432) and FlexLoRA (arXiv 2402.11505).

Both are methods for dense models; here every expert has LoRA pairs. Decisions: ranks follow budgets, so HetLoRA's own
pruning of ranks during training is left out; a pair counts only if its expert was trained, because a copy that was only
cut to a lower rank would erase what others learned in the rest; gates are averaged by the clients' rows.
"""

from dataclasses import replace

import torch
from torch import Tensor

from hfedmoe.method.holding import every, gate_by_examples
from hfedmoe.method.ranks import Ranks, by_share, product_norm
from hfedmoe.method.rivals.conflicts import by_examples
from hfedmoe.method.row import Method


def by_norm(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """HetLoRA: a pair counts its product's norm, if it counts at all: float32 [n]."""
    return torch.where(weight > 0, product_norm(a, b).to(weight.device), 0.0)


HETLORA = Method(
    holds="everything, whatever its budget; that decides the rank of its LoRA pairs",
    trains="what its tokens are routed to",
    travels="what it trained, in its own rank",
    server="mean of LoRA factors, padded with zeros and weighted by the norm of their product; a client gets the first "
    "rows and columns, as many as its rank",
    source="arXiv 2401.06432",
    status="secondary",
    hold=lambda outlook, settings: every(outlook),
    unlimited=True,
    expert_weight=by_examples,
    gate_weight=gate_by_examples,
    ranks=Ranks(by_share, exact=False, weight=by_norm),
)
FLEXLORA = replace(
    HETLORA,
    server="mean of the products of LoRA pairs, weighted by the clients' rows; a client gets the nearest product of "
    "its rank (SVD)",
    source="arXiv 2402.11505",
    ranks=Ranks(by_share, exact=True),
)
