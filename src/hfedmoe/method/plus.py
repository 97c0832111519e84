"""HFedMoE+: the paper's sub-models, but chosen by the server for all clients together.

Each client alone would hold the experts of its own most tokens, and experts that are second best everywhere would never
be trained. The server knows all clients' routing, so it chooses

    max sum over c, e of |D_c| share_c(e) x[c, e]

where share_c(e) is the share of the layer's tokens that client c routes to expert e: as many tokens of the federation
as possible meet their experts on the device where they are. Every expert is held by `cover` clients at least, if
budgets allow, and every layer of a client gets its even share of the budget, because shares of tokens say nothing about
layers.
"""

from math import floor

import numpy as np
import torch
from torch import Tensor

from hfedmoe.method.hfedmoe import HFEDMOE
from hfedmoe.method.holding import hold_most_used
from hfedmoe.method.planning import best_plan
from hfedmoe.method.row import Method, Option, Residents, Settings, Wish
from hfedmoe.method.selection import activation, even_shares

COVER = Option("cover", 1.0, "clients that hold an expert at least, as far as budgets allow")


def assign(wishes: list[Wish], held: Tensor, settings: Settings) -> list[Residents]:
    """The plan of a round: bool [E_l] per layer, for each wish."""
    numbers = wishes[0].num_experts
    total = sum(numbers)
    rows = sum(wish.examples for wish in wishes)
    value = np.stack([torch.cat([_shares(layer) for layer in wish.contribution]).double().numpy() for wish in wishes])
    value *= np.array([[wish.examples / rows] for wish in wishes])
    value += 1e-9  # all positive, so that budgets are filled
    budgets = [min(wish.budget, total) for wish in wishes]
    floors = [even_shares(numbers, budget, max(wish.top_k)) for wish, budget in zip(wishes, budgets, strict=True)]
    least = min(floor(COVER.of(settings)), sum(budgets) // total)
    return best_plan(value, numbers, budgets, floors, least, len(wishes))


def _shares(scores: Tensor) -> Tensor:
    scores = scores.float().clamp_min(0.0)
    return scores / scores.sum().clamp_min(1e-12)


HFEDMOE_PLUS = Method(
    holds="what the server gives it: its own most used experts, so that all clients together hold every expert",
    trains=HFEDMOE.trains,
    travels="what it trained, and how often its tokens use every expert",
    server="assigns by a linear programme; " + HFEDMOE.server,
    source="-",
    status="own",
    hold=hold_most_used,
    train=activation,
    score=lambda settings: "frequency",
    assign=assign,
    expert_weight=HFEDMOE.expert_weight,
    gate_weight=HFEDMOE.gate_weight,
    gate_rows=HFEDMOE.gate_rows,
    options=(COVER,),
)
