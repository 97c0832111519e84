"""Which experts a client holds, and what copies count: the choices that several methods share."""

import torch
from torch import Tensor

from hfedmoe.method.copies import Copies
from hfedmoe.method.row import CannotHoldError, Outlook, Residents, Settings
from hfedmoe.method.scores import SCORES
from hfedmoe.method.selection import comparable, select


def hold_best(outlook: Outlook, settings: Settings) -> Residents:
    """The experts of the highest scores within the budget, top-k at least in every layer (eq. 15)."""
    if outlook.budget >= sum(outlook.num_experts):
        return hold_all(outlook, settings)
    row = SCORES[settings.score]
    if row.drawn:
        return hold_random(outlook, settings)
    contribution = outlook.contribution()
    if row.by_layer:
        contribution = comparable(contribution)
    return select(contribution, outlook.budget, at_least=max(outlook.top_k), ties=outlook.draws)


def hold_most_used(outlook: Outlook, settings: Settings) -> Residents:
    """The experts of the highest scores, whichever they are, as they stand: for methods that name their own score."""
    if outlook.budget >= sum(outlook.num_experts):
        return hold_all(outlook, settings)
    return select(outlook.contribution(), outlook.budget, at_least=max(outlook.top_k), ties=outlook.draws)


def hold_random(outlook: Outlook, settings: Settings) -> Residents:
    """Experts drawn anew in every round, within the budget."""
    drawn = [torch.rand(number, generator=outlook.draws) for number in outlook.num_experts]
    return select(drawn, min(outlook.budget, sum(outlook.num_experts)), at_least=max(outlook.top_k), ties=outlook.draws)


def hold_all(outlook: Outlook, settings: Settings) -> Residents:
    """Every expert. Raises CannotHoldError on a device that has no room for all."""
    total = sum(outlook.num_experts)
    if outlook.budget < total:
        raise CannotHoldError(f"it has room for {outlook.budget} of the {total} experts that the method holds")
    return every(outlook)


def every(outlook: Outlook) -> Residents:
    """All experts, whatever there is room for."""
    return [torch.ones(number, dtype=torch.bool) for number in outlook.num_experts]


def gate_by_examples(copies: Copies, settings: Settings) -> Tensor:
    """|D_c| for each layer: copies of [..., E] -> float32 [...]."""
    return torch.full(copies.usage.shape[:-1], float(copies.examples))


def over_holders(copies: Copies, settings: Settings) -> Tensor:
    """|D_c| for every expert that the client held: float32 [..., E]."""
    return torch.where(copies.held, float(copies.examples), 0.0)
