"""Methods in which a weak client trains LoRA pairs of a smaller rank: HetLoRA and FlexLoRA, per expert.

Every client holds all experts, and its budget decides the rank: its share of all experts, of the configured rank. The
server sends the first components of every pair, and the client trains and returns these alone.

HetLoRA (arXiv 2401.06432)   A = sum_c w_c [A_c; 0] / sum_c w_c, B likewise, w_c = ||B_c A_c||_F |D_c|
FlexLoRA (arXiv 2402.11505)  M = sum_c |D_c| B_c A_c / sum_c |D_c| = U S V^T; a client gets the first r_c of
                             S V^T and U, which is the best approximation of M of rank r_c

Decision: both papers are about whole models. Here each expert is averaged over those that trained it, and the norm is
that of all its pairs together. A pair is scaled by alpha / (the configured rank), whatever a client's rank, so that a
component means the same everywhere. HetLoRA's local pruning of ranks is left out. Its norms come from what clients
send: a client with very large factors counts more, whatever `federation.max_weight` says.
"""

from dataclasses import replace

import torch
from torch import Tensor

from hfedmoe.method.copies import Copies
from hfedmoe.method.holding import every, gate_by_examples, over_trainers
from hfedmoe.method.row import Method, Settings


def rank_of(share: float, rank: int) -> int:
    """Of the configured rank as large a share as the client's budget has of all experts: 1 to `rank`."""
    return max(1, min(rank, round(share * rank)))


def by_size(copies: Copies, settings: Settings) -> Tensor:
    """||B A||_F |D_c| of every expert that the client trained: float32 [..., E]."""
    assert copies.size is not None
    return torch.where(copies.trained, copies.size * copies.examples, 0.0)


HETLORA = Method(
    holds="everything, whatever its budget; that decides the rank of its LoRA pairs",
    trains="what its tokens are routed to, the first components of each LoRA pair",
    travels="these components of what it trained",
    server="mean of the factors filled up with zeros, weighted by the norm of the product times the clients' rows",
    source="arXiv 2401.06432",
    status="secondary",
    hold=lambda outlook, settings: every(outlook),
    unlimited=True,
    expert_weight=by_size,
    gate_weight=gate_by_examples,
    rank=rank_of,
    needs_size=True,
)
FLEXLORA = replace(
    HETLORA,
    server="mean of the products, weighted by the clients' rows; its SVD gives every client the best of its rank",
    source="arXiv 2402.11505",
    expert_weight=over_trainers,
    needs_size=False,
    averages_products=True,
)
