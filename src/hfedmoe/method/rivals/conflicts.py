"""Methods that compare the clients' updates of an expert before they average them: FC-MoE and FedAlign-MoE."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hfedmoe.method.copies import Copies
from hfedmoe.method.holding import gate_by_examples, hold_all
from hfedmoe.method.row import Method, Option, Settings

BACK = Option("back", 0.5, "share of what was removed from a client's update that it adds to its next start", high=1.0)
SPREAD = Option("spread", 1.0, "updates less similar than the mean by so many standard deviations are left out")
PENALTY = Option("penalty", 0.1, "weight of the distance to the federation's routing in the local loss")


def by_tokens(copies: Copies, settings: Settings) -> Tensor:
    """The share of the client's tokens that the expert processed, where it was trained: float32 [..., E]."""
    tokens = copies.tokens.float()
    return torch.where(copies.trained, tokens / tokens.sum(-1, keepdim=True).clamp_min(1.0), 0.0)


def without_conflicts(changes: Tensor, weights: Tensor, settings: Settings) -> Tensor:
    """FC-MoE: weights are frequency times norm; an update that opposes the weighted direction loses that part.

    Args:
        changes: [C, N]; weights: [C].

    Returns:
        [N].
    """
    weights = weights * changes.norm(dim=1)
    if not bool(weights.sum() > 0):
        return torch.zeros_like(changes[0])
    weights = weights / weights.sum()
    direction = weights @ changes
    return weights @ (changes - _opposed(changes, direction))


def _opposed(changes: Tensor, direction: Tensor) -> Tensor:
    """The parts of changes [C, N] along a direction [N] that point against it; 0 for the others."""
    along = changes @ direction / direction.square().sum().clamp_min(1e-30)
    return along.clamp_max(0.0)[:, None] * direction


def give_back(received: Tensor, began: Tensor, ended: Tensor, settings: Settings) -> Tensor:
    """FC-MoE: a client adds part of what the server removed from its update.

    Decision: the client takes the change of the global expert since its last start as the direction.
    """
    removed = _opposed((ended - began)[None], received - began)[0]
    return received + BACK.of(settings) * removed


def among_similar(changes: Tensor, weights: Tensor, settings: Settings) -> Tensor:
    """FedAlign-MoE: the weighted mean over those whose cosine with the mean update is at least mean - spread * std.

    Args:
        changes: [C, N]; weights: [C].

    Returns:
        [N].
    """
    if not bool(weights.sum() > 0):
        return torch.zeros_like(changes[0])
    mean = weights @ changes / weights.sum()
    similar = torch.nn.functional.cosine_similarity(changes, mean[None], dim=1)
    keep = similar >= similar.mean() - SPREAD.of(settings) * similar.std(correction=0) - 1e-6
    weights = torch.where(keep, weights, 0.0)
    return weights @ changes / weights.sum() if bool(weights.sum() > 0) else mean


def to_the_federation(batch: Sequence[Tensor], usage: Sequence[Tensor], settings: Settings) -> Tensor:
    """FedAlign-MoE: KL(batch || federation) of the routing distributions, the mean over the layers."""
    terms = [
        (own.clamp_min(1e-9) * (own.clamp_min(1e-9) / usual.to(own.device).clamp_min(1e-9)).log()).sum()
        for own, usual in zip(batch, usage, strict=True)
    ]
    return PENALTY.of(settings) * torch.stack(terms).mean()


def by_consistency(copies: Copies, settings: Settings) -> Tensor:
    """FedAlign-MoE: the cosine of a client's usage and the federation's, times |D_c|: float32 [...]."""
    if copies.federation is None:
        return gate_by_examples(copies, settings)
    usage = copies.usage.float()
    return torch.nn.functional.cosine_similarity(usage, copies.federation.float(), dim=-1) * copies.examples


def by_examples(copies: Copies, settings: Settings) -> Tensor:
    """|D_c| for every expert that the client trained: float32 [..., E]."""
    return torch.where(copies.trained, float(copies.examples), 0.0)


FC_MOE = Method(
    holds="everything; a client without room for it takes no part",
    trains="what its tokens are routed to",
    travels="what it trained, and how often it was used",
    server="mean weighted by frequency times size of the update, without parts that oppose the common direction; a "
    "client adds half of what was removed to its next start",
    source="arXiv 2606.15625",
    status="secondary",
    hold=hold_all,
    expert_weight=by_tokens,
    gate_weight=gate_by_examples,
    combine=without_conflicts,
    begin=give_back,
    options=(BACK,),
)
FEDALIGN_MOE = Method(
    holds="everything; a client without room for it takes no part",
    trains="what its tokens are routed to, with a penalty for routing otherwise than the federation",
    travels="what it trained, and its usage",
    server="experts: mean over similar updates; gates: by agreement with the federation's routing",
    source="arXiv 2603.21276",
    status="secondary",
    hold=hold_all,
    expert_weight=by_examples,
    gate_weight=by_consistency,
    combine=among_similar,
    routing_term=to_the_federation,
    options=(SPREAD, PENALTY),
)
