"""HFedMoE+: sub-models that the server chooses for all clients together, and a loss that knows of skewed labels.

Each client alone would hold the experts of its own most tokens, and experts that are second best everywhere would never
be trained. The server knows all clients' routing, so it chooses

    max sum over c, e of |D_c| share_c(e) x[c, e]

where share_c(e) is the share of the layer's tokens that client c routes to expert e: as many tokens of the federation
as possible meet their experts on the device where they are. Every expert is held by `cover` clients at least, if
budgets allow, and every layer of a client gets its even share of the budget, because shares of tokens say nothing about
layers.

A client whose rows have few labels would teach the shared model that there are no others. So the loss of classification
adds the logarithm of the client's own label frequencies to the logits (logit adjustment, Menon et al., 2021; among
clients, FedLC, Zhang et al., 2022): the model learns what distinguishes labels, not how often the client has them.

A row of a gate belongs to its expert: it is averaged over the clients that trained the expert. The server then goes on
beyond the clients' mean (a server learning rate, Reddi et al., 2021), because means of a few copies move too little.
"""

from math import floor

import numpy as np
import torch
from torch import Tensor

from hfedmoe.method.gates import gate_mass, gate_row_weights
from hfedmoe.method.hfedmoe import HFEDMOE
from hfedmoe.method.holding import hold_most_used
from hfedmoe.method.planning import best_plan
from hfedmoe.method.row import Method, Option, Residents, Settings, Wish
from hfedmoe.method.selection import activation, even_shares

COVER = Option("cover", 1.0, "clients that hold an expert at least, as far as budgets allow")
STEP = Option("server_step", 1.5, "step of the server towards the clients' mean, as a multiple of the way", high=10.0)
CORRECTION = Option("label_correction", 1.0, "strength of the correction for a client's label frequencies")


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
    trains=HFEDMOE.trains + ", with a loss that is corrected for its label frequencies",
    travels="what it trained, and how often its tokens use every expert",
    server="assigns by a linear programme; mean over those that trained and used the expert, and of its row of the "
    "gate; then a step beyond the mean",
    source="-",
    status="own",
    hold=hold_most_used,
    train=activation,
    score=lambda settings: "frequency",
    label_correction=CORRECTION.of,
    server_step=STEP.of,
    assign=assign,
    expert_weight=HFEDMOE.expert_weight,
    kept_weight=HFEDMOE.kept_weight,
    gate_weight=lambda copies, settings: gate_mass(copies, settings.tau),
    gate_rows=lambda copies, settings: gate_row_weights(copies, settings.tau),
    options=(COVER, CORRECTION, STEP),
)
