"""FLAME (arXiv 2506.16600): every client holds all experts, and a weak one uses fewer of them for each token."""

from torch import Tensor

from hfedmoe.method.copies import Copies
from hfedmoe.method.holding import every, gate_by_examples
from hfedmoe.method.row import Method, Option, Settings

POWER = Option("power", 2.0, "power of the frequency in the weight of a copy (the paper: 2 to 4)")


def experts_per_token(share: float, top_k: int) -> int:
    """Of the model's top-k as large a share as the client's budget has of all experts, one at least."""
    return max(1, min(top_k, round(share * top_k)))


def by_frequency(copies: Copies, settings: Settings) -> Tensor:
    """frequency^t * |D_c|, the frequency as a share of the layer's tokens: float32 [..., E]."""
    tokens = copies.tokens.float()
    return (tokens / tokens.sum(-1, keepdim=True).clamp_min(1.0)) ** POWER.of(settings) * copies.examples


FLAME = Method(
    holds="everything, whatever its budget; that decides how many experts work on a token",
    trains="what its tokens are routed to, and a scale of each layer's experts, which it keeps",
    travels="what it trained",
    server="mean weighted by a power of the frequency times the clients' rows",
    source="arXiv 2506.16600",
    status="secondary",
    hold=lambda outlook, settings: every(outlook),
    unlimited=True,
    private=frozenset(("scale",)),
    expert_weight=by_frequency,
    gate_weight=gate_by_examples,
    experts_per_token=experts_per_token,
    options=(POWER,),
)
