"""Flux (arXiv 2508.19078): a client tunes its most useful experts, and merges the others so that the model fits.

Decisions, since the paper is known from descriptions by others: half of the room is for merged experts, in even shares
of the layers; K-means groups experts by their rows of the router; a group's weights are the client's usage alone,
because fused attention gives no attention scores; the gradient in the utility is that of the down projection, which a
client measures only for experts that it holds, so that others are found by exploration; profiling is in full precision.
"""

import torch
from torch import Tensor

from hfedmoe.method.holding import every, gate_by_examples
from hfedmoe.method.rivals.conflicts import by_examples
from hfedmoe.method.row import Method, Option, Outlook, Residents, Settings
from hfedmoe.method.selection import even_shares

MERGED = Option("merged", 0.5, "share of a layer's room that is for merged experts", high=1.0)
EXPLORE = Option("explore", 0.5, "share of the tuned experts that is drawn at random in the first round", high=1.0)
DECAY = Option("decay", 0.8, "factor on that share from round to round", high=1.0)


def merged(num_experts: list[int], budget: int, settings: Settings) -> list[int]:
    """Merged experts per layer: a share of its room, one at least and one expert less than its room.

    None in a layer that has room for all of its experts, or for one.
    """
    if budget >= sum(num_experts):
        return [0] * len(num_experts)
    return [
        0 if room in (1, number) else max(1, min(room - 1, round(MERGED.of(settings) * room)))
        for room, number in zip(even_shares(num_experts, budget, 1), num_experts, strict=True)
    ]


def hold_useful(outlook: Outlook, settings: Settings) -> Residents:
    """Tuned experts: the most useful ones, and a share of others, drawn at random, that shrinks from round to round."""
    if outlook.budget >= sum(outlook.num_experts):
        return every(outlook)
    rooms = even_shares(outlook.num_experts, outlook.budget, 1)
    for_merged = merged(outlook.num_experts, outlook.budget, settings)
    share = EXPLORE.of(settings) * DECAY.of(settings) ** (outlook.round - 1)
    held = []
    for layer, value in enumerate(utility(outlook)):
        number = rooms[layer] - for_merged[layer]
        explored = round(share * number)
        # Equal values in random order: in the first rounds there are many.
        order = torch.randperm(len(value), generator=outlook.draws)
        order = order[value[order].argsort(descending=True, stable=True)]
        rest = order[number - explored :]
        drawn = rest[torch.randperm(len(rest), generator=outlook.draws)[:explored]]
        keep = torch.zeros(len(value), dtype=torch.bool)
        keep[order[: number - explored]] = keep[drawn] = True
        held.append(keep)
    return held


def utility(outlook: Outlook) -> list[Tensor]:
    """Tokens times root mean square gradient, up to a factor: float32 [E] per layer.

    With n tokens and the sum G of their squared gradients (score `ghost`), n sqrt(G / n) = sqrt(n G).
    """
    scores = outlook.contribution()
    if outlook.usage is None:
        return scores  # before its first round a client knows no gradients
    return [(own * score.clamp_min(0.0)).sqrt() for own, score in zip(outlook.usage, scores, strict=True)]


FLUX = Method(
    holds="its most useful experts and some drawn at random, fewer in every round; the others merged, so that they fit",
    trains="what it holds unmerged",
    travels="what it trained",
    server="mean over those that trained the expert, weighted by the clients' rows",
    source="arXiv 2508.19078",
    status="secondary",
    hold=hold_useful,
    score=lambda settings: "ghost",
    merged=merged,
    expert_weight=by_examples,
    gate_weight=gate_by_examples,
    options=(MERGED, EXPLORE, DECAY),
)
