"""How much a client uses each expert, and what its copy of the expert counts (equations 16 and 17).

u_c(e)   = mean over D_c of g(e)                                             (16)
E_e(t+1) = sum_c w_c(e) E_e(c) / sum_c w_c(e)                                (17)
w_c(e)   = |D_c| * 1[u_c(e) >= tau / E] * 1[c trained e]      rule "samples", the paper's
           tokens_c(e) * (the same)                           rule "tokens"
           |D_c| * s_c(e) * (the same)                        rule "importance"
"""

import torch
from torch import Tensor

from hfedmoe.method.importance import cumulative

EXPERT_RULES = ("samples", "tokens", "importance")


def usage(g: Tensor) -> Tensor:
    """Usage u_c of every expert: [B, E] of a client's samples -> float32 [E], eq. 16. Raises ValueError if B = 0."""
    return cumulative(g)


def passes(usage: Tensor, tau: float) -> Tensor:
    """Which experts a client uses enough to count, the set S_c: usage [..., E] -> bool [..., E].

    Raises ValueError if tau is negative.
    """
    if not tau >= 0:
        raise ValueError(f"tau={tau} must not be negative")
    # Decision: tau is a multiple of the uniform share 1/E, so that one value fits models of any E.
    return usage.detach().float() >= tau / usage.shape[-1]


def expert_weights(
    rule: str, num_examples: int, usage: Tensor, importance: Tensor, tokens: Tensor, trained: Tensor, tau: float
) -> Tensor:
    """The weight w_c(e) of one client's copy of every expert of a layer (or of alike layers at once), eq. 17.

    Args:
        rule: one of `EXPERT_RULES`.
        num_examples: |D_c|.
        usage: [..., E], u_c.
        importance: [..., E], s_c.
        tokens: [..., E], tokens of the client routed to each expert.
        trained: bool [..., E], the copies that may take part: those that received an optimizer step. (A rival that
            averages over all holders passes what is resident, and tau = 0.)
        tau: threshold as a multiple of 1/E.

    Returns:
        float32 [..., E], 0 where the client takes no part.

    Raises:
        ValueError: unknown rule, negative tau or number of examples, or vectors of different lengths.
    """
    if num_examples < 0:
        raise ValueError(f"num_examples={num_examples} must not be negative")
    shapes = {tuple(vector.shape) for vector in (usage, importance, tokens, trained)}
    if len(shapes) > 1:
        raise ValueError(f"usage, importance, tokens and trained must all be [..., E], got {sorted(shapes)}")
    if rule == "samples":
        weight = torch.full_like(usage, num_examples, dtype=torch.float32)
    elif rule == "tokens":
        weight = tokens.detach().float()
    elif rule == "importance":
        weight = num_examples * importance.detach().float()
    else:
        raise ValueError(f'expert rule "{rule}" is unknown; known: {", ".join(EXPERT_RULES)}')
    # Decision: usage is no proof of training, so a copy needs both; an expert without any keeps its global value.
    return torch.where(trained & passes(usage, tau), weight, 0.0)
