"""Federated averaging, with a proximal term, and with part of the experts at random or by frequency."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hfedmoe.method.holding import gate_by_examples, hold_all, hold_most_used, hold_random, over_holders
from hfedmoe.method.row import Method, Option, Settings

MU = Option("mu", 0.01, "weight of the proximal term")


def proximal(now: Sequence[Tensor], start: Sequence[Tensor], settings: Settings) -> Tensor:
    """mu / 2 * ||w - w_global||^2 over everything that the round has trained so far."""
    distances = [((w - w0) ** 2).sum() for w, w0 in zip(now, start, strict=True)]
    return MU.of(settings) / 2 * torch.stack(distances).sum()


FEDAVG = Method(
    holds="everything; a client without room for it takes no part",
    trains="everything",
    travels="everything",
    server="mean over all copies, trained or not, weighted by the clients' rows",
    source="arXiv 1602.05629",
    status="full text",
    hold=hold_all,
    sends="held",
    expert_weight=over_holders,
    gate_weight=gate_by_examples,
)
FEDPROX = replace(
    FEDAVG,
    trains="everything, held near the global model by a term in the loss",
    source="arXiv 1812.06127",
    local_term=proximal,
    options=(MU,),
)
RANDOM = replace(
    FEDAVG,
    holds="experts drawn at random in every round, within its budget",
    trains="what it holds",
    travels="what it holds",
    server="mean over those that held the expert, weighted by the clients' rows",
    source="baseline in arXiv 2408.11304",
    hold=hold_random,
)
FREQUENCY = replace(
    RANDOM,
    holds="the experts that its tokens are routed to most often, within its budget",
    hold=hold_most_used,
    score=lambda settings: "frequency",
)
