"""Flux (arXiv 2508.19078): a client tunes its most useful experts, and merges the others so that the model fits.

A growing share of the tuned experts are those of the highest utility, tokens times root mean square of the gradient;
the others are drawn at random, so that the client also learns what they are worth.

Decisions, since the paper is known from descriptions by others: half of the room is for merged experts, in even shares
of the layers; K-means groups experts by their rows of the router; a group's weights are the client's usage alone,
because fused attention gives no attention scores; the gradient in the utility is that of the down projection (score
`utility`), which a client measures only for experts that it holds; the share grows linearly over the rounds; profiling
is in full precision.
"""

import torch

from hfedmoe.method.holding import every, gate_by_examples, over_trainers
from hfedmoe.method.row import Method, Option, Outlook, Residents, Settings
from hfedmoe.method.selection import even_shares

MERGED = Option("merged", 0.5, "share of a layer's room that is for merged experts", high=1.0)
FIRST = Option("exploit_first", 0.5, "share of the most useful among the tuned experts in the first round", high=1.0)
LAST = Option("exploit_last", 0.9, "the same in the last round", high=1.0)


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
    """Tuned experts: a growing share of the most useful ones, and others drawn at random."""
    if outlook.budget >= sum(outlook.num_experts):
        return every(outlook)
    rooms = even_shares(outlook.num_experts, outlook.budget, 1)
    for_merged = merged(outlook.num_experts, outlook.budget, settings)
    first, last = FIRST.of(settings), LAST.of(settings)
    share = first + (last - first) * outlook.progress
    held = []
    for layer, value in enumerate(outlook.contribution()):
        number = rooms[layer] - for_merged[layer]
        best = round(share * number)
        # Equal values in random order: in the first rounds there are many.
        order = torch.randperm(len(value), generator=outlook.draws)
        order = order[value[order].argsort(descending=True, stable=True)]
        rest = order[best:]
        drawn = rest[torch.randperm(len(rest), generator=outlook.draws)[: number - best]]
        keep = torch.zeros(len(value), dtype=torch.bool)
        keep[order[:best]] = keep[drawn] = True
        held.append(keep)
    return held


FLUX = Method(
    holds="its most useful experts, a growing share, and some drawn at random; the others merged, so that they fit",
    trains="what it holds unmerged",
    travels="what it trained",
    server="mean over those that trained the expert, weighted by the clients' rows",
    source="arXiv 2508.19078",
    status="secondary",
    hold=hold_useful,
    score=lambda settings: "utility",
    merged=merged,
    expert_weight=over_trainers,
    gate_weight=gate_by_examples,
    options=(MERGED, FIRST, LAST),
)
