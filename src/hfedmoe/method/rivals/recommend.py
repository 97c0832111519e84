"""FedMoE's second stage (arXiv 2408.11304): the server recommends other sub-models where training stalls.

A client keeps the sub-model of the first stage. When its loss stalls, the server finds the clients of the round whose
experts are activated alike (cosine of the activation vectors) and changes the number of its experts towards their mean:
the most activated absent ones are added, or the least activated ones dropped. Without a gain the client gets back what
it had.

Decisions: the loss of a client's last step stands for its accuracy, and everything is judged by it; the number changes
at once to the mean, rounded, within the client's room; what was tried before is not recommended again.
"""

from dataclasses import replace

import torch
from torch import Tensor

from hfedmoe.method.rivals.fedmoe import FEDMOE, to_threshold
from hfedmoe.method.row import PAST, Option, Past, Residents, Settings, Wish

PATIENCE = Option("patience", 2.0, "rounds without a lower loss after which training stalls", low=1.0, high=PAST - 1.0)
GAIN = Option("gain", 0.01, "share of the loss that counts as a gain", high=1.0)
ALIKE = Option("alike", 0.8, "cosine of activation vectors from which clients are similar", low=-1.0, high=1.0)


def assign(wishes: list[Wish], held: Tensor, settings: Settings) -> list[Residents]:
    """What each client holds: bool [E_l] per layer, for each wish."""
    now = [_current(wish, settings) for wish in wishes]
    vectors = torch.stack([torch.cat(wish.contribution).float() for wish in wishes])
    similar = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=2) >= ALIKE.of(settings)
    similar.fill_diagonal_(False)
    sizes = torch.tensor([float(sum(int(keep.sum()) for keep in own)) for own in now])
    return [
        _recommended(wish, own, round(float(sizes[alike].mean())))
        if bool(alike.any()) and stalls(wish.past, settings)
        else own
        for wish, own, alike in zip(wishes, now, similar, strict=True)
    ]


def _current(wish: Wish, settings: Settings) -> Residents:
    """What a client holds without a new recommendation, within its present room."""
    first = to_threshold(wish.contribution, wish.budget, max(wish.top_k))
    if wish.budget >= sum(wish.num_experts):
        first = [torch.ones(number, dtype=torch.bool) for number in wish.num_experts]
    if not wish.past:
        return first
    *before, last = wish.past
    own = last.held
    if before and not _same(own, before[-1].held):
        undone = len(before) > 1 and _same(own, before[-2].held)  # the last change was itself a return
        if not undone and last.loss >= (1 - GAIN.of(settings)) * before[-1].loss:
            own = before[-1].held
    return own if sum(int(keep.sum()) for keep in own) <= wish.budget else first  # it may have run out of memory


def stalls(past: list[Past], settings: Settings) -> bool:
    """Whether the loss has not fallen for some rounds, all with the same experts but for what was tried in vain."""
    patience = int(PATIENCE.of(settings))
    if len(past) <= patience or not _same(past[-1].held, past[-1 - patience].held):
        return False
    best = min(one.loss for one in past[:-patience])
    return min(one.loss for one in past[-patience:]) >= (1 - GAIN.of(settings)) * best


def _recommended(wish: Wish, own: Residents, number: int) -> Residents:
    """`own` with experts added or dropped towards a number of experts over all layers."""
    number = min(number, wish.budget)
    held, scores = torch.cat(own), torch.cat(wish.contribution).float()
    # Layers are compared by the share of their tokens; top-k of every layer stay.
    fixed = torch.cat([_top(layer, keep, k) for layer, keep, k in zip(wish.contribution, own, wish.top_k, strict=True)])
    rank = scores + 2.0 * held + 4.0 * fixed  # scores are shares of 1
    new = torch.zeros_like(held)
    new[rank.argsort(descending=True, stable=True)[: max(number, int(fixed.sum()))]] = True
    plan = list(new.split(wish.num_experts))
    return own if any(_same(plan, one.held) for one in wish.past) else plan


def _top(scores: Tensor, keep: Tensor, number: int) -> Tensor:
    """The best of those that are held, bool [E]."""
    order = torch.where(keep, scores.float(), -1.0).argsort(descending=True, stable=True)
    return torch.zeros_like(keep).index_fill(0, order[:number], True)


def _same(one: Residents, other: Residents) -> bool:
    return all(torch.equal(own, theirs) for own, theirs in zip(one, other, strict=True))


FEDMOE_FULL = replace(
    FEDMOE,
    holds="as fedmoe at first; where its loss stalls, more or fewer experts, as similar clients have",
    travels="what it holds, and how often its tokens use every expert",
    server="recommends sub-models, and takes back those without a gain; else as fedmoe",
    assign=assign,
    options=(PATIENCE, GAIN, ALIKE),
)
