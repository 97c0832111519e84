"""Which experts a client holds, and what copies count: the choices that several methods share."""

from collections.abc import Callable

import torch
from torch import Tensor

from hfedmoe.method.copies import Copies
from hfedmoe.method.row import CannotHoldError, Outlook, Residents, Settings
from hfedmoe.method.scores import SCORES
from hfedmoe.method.selection import comparable, even_shares, select

LAYERS: dict[str, Callable[[Outlook], int | list[int]]] = {
    "together": lambda outlook: max(outlook.top_k),
    "even": lambda outlook: even_shares(outlook.num_experts, outlook.budget, max(outlook.top_k)),
}
"""How a budget is spent over the layers: the experts that each layer gets at least, whatever its scores."""


def hold_best(outlook: Outlook, settings: Settings) -> Residents:
    """The experts of the highest scores within the budget, top-k at least in every layer (eq. 15)."""
    row = SCORES[settings.score]

    def scores() -> list[Tensor]:
        if row.drawn:
            return _drawn(outlook)
        # In even shares, layers compete only for the few experts that are left when the budget is divided.
        return (
            comparable(outlook.contribution()) if row.by_layer or settings.layers == "even" else outlook.contribution()
        )

    return _highest(outlook, scores, LAYERS[settings.layers])


def hold_most_used(outlook: Outlook, settings: Settings) -> Residents:
    """The experts of the highest scores, whichever they are, as they stand: for methods that name their own score."""
    return _highest(outlook, outlook.contribution)


def hold_random(outlook: Outlook, settings: Settings) -> Residents:
    """Experts drawn anew in every round, within the budget."""
    return _highest(outlook, lambda: _drawn(outlook))


def _drawn(outlook: Outlook) -> list[Tensor]:
    return [torch.rand(number, generator=outlook.draws) for number in outlook.num_experts]


def _highest(
    outlook: Outlook,
    scores: Callable[[], list[Tensor]],
    at_least: Callable[[Outlook], int | list[int]] = LAYERS["together"],
) -> Residents:
    """The experts of the highest scores [E_l] per layer; scores are not asked for if there is room for all."""
    if outlook.budget >= sum(outlook.num_experts):
        return every(outlook)
    return select(scores(), outlook.budget, at_least(outlook), ties=outlook.draws)


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


def over_trainers(copies: Copies, settings: Settings) -> Tensor:
    """|D_c| for every expert that the client trained: float32 [..., E]."""
    return torch.where(copies.trained, float(copies.examples), 0.0)
