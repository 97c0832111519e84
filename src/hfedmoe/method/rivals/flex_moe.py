"""FLEX-MoE (arXiv 2512.23070): the server assigns experts, with bounds on how many clients train each of them.

Decision: the bounds are multiples of the mean load; a client's fitness for an expert is its score as a share of its
best one in the layer; an expert is credited with what it was held less often than the mean so far.
"""

import math

import numpy as np
import torch
from torch import Tensor

from hfedmoe.method.copies import Copies
from hfedmoe.method.holding import gate_by_examples, hold_most_used
from hfedmoe.method.planning import best_plan
from hfedmoe.method.row import Method, Option, Residents, Settings, Wish

LOW = Option("least_load", 0.5, "clients per expert at least, as a multiple of the mean", high=1.0)
HIGH = Option("most_load", 2.0, "clients per expert at most, as a multiple of the mean", low=1.0)
CREDIT = Option("credit", 0.5, "weight of the credit for experts that few clients held so far")


def assign(wishes: list[Wish], held: Tensor, settings: Settings) -> list[Residents]:
    """max sum over c, e of (fitness + credit) x[c, e], by a linear programme.

    Each client holds at most its budget and top-k at least in every layer; each expert is held by a number of clients
    within the bounds, as far as budgets allow.

    Returns:
        bool [E_l] per layer, for each wish.
    """
    numbers, clients = wishes[0].num_experts, len(wishes)
    total = sum(numbers)
    fitness = np.stack([torch.cat([_fitness(layer) for layer in wish.contribution]).numpy() for wish in wishes])
    credit = (held.mean() - held) / held.mean().clamp_min(1.0)
    value = fitness + CREDIT.of(settings) * credit.numpy()[None]
    value += 1 - value.min()  # all positive, so that budgets are filled; the order of full plans stays
    budgets = [min(wish.budget, total) for wish in wishes]
    mean = sum(budgets) / total
    least, most = math.floor(LOW.of(settings) * mean), min(clients, math.ceil(HIGH.of(settings) * mean))
    # top-k in every layer may be more than the upper bound: then the bounds on experts are dropped
    return best_plan(value, numbers, budgets, [wish.top_k for wish in wishes], least, most)


def _fitness(scores: Tensor) -> Tensor:
    scores = scores.float().clamp_min(0.0)
    best = scores.max()
    return scores / best if best > 0 else scores


def by_usage(copies: Copies, settings: Settings) -> Tensor:
    """Usage times |D_c| for every expert that the client was given: float32 [..., E]."""
    return torch.where(copies.held, copies.usage.float() * copies.examples, 0.0)


FLEX_MOE = Method(
    holds="what the server gives it: the best fit over all clients, with bounds on the load of every expert",
    trains="what it holds, and a gate of its own, which it keeps",
    travels="what it holds, and its fitness for every expert",
    server="assigns by a linear programme; mean over those that were given the expert, weighted by usage",
    source="arXiv 2512.23070",
    status="secondary",
    hold=hold_most_used,
    score=lambda settings: "frequency",
    sends="held",
    private=frozenset(("router",)),
    expert_weight=by_usage,
    gate_weight=gate_by_examples,
    assign=assign,
    options=(LOW, HIGH, CREDIT),
)
