"""How much an expert is worth to a client, from the routing of one batch (equations 3-5 and 10-14).

`g[i, e]` is the routing probability of expert `e` for sample `i`; rows sum to 1 over the experts:

    cumulative(e) = mean_i g[i, e]                                   (3)   p(z_e), eq. 10
    specific(e)   = max_i g[i, e]                                    (4)
    s(e)          = lam * cumulative(e) + (1 - lam) * specific(e)    (5)
    redundancy(e) = mean_i g[i, e] * log(g[i, e] / cumulative(e))    (11)  0 log 0 = 0
    I(e)          = s(e) - beta * redundancy(e)                      (14)

With one row per token instead of one per sample, the same functions give the token-level variant.

These functions run for every layer of every batch: they check shapes, never values. Entries that are negative or not
finite give meaningless results, not errors.
"""

import torch
from torch import Tensor


def routing_probabilities(logits: Tensor, kind: str) -> Tensor:
    """The router's probabilities over all experts of the layer, before top-k and before masking.

    Args:
        logits: [T, E].
        kind: "softmax", or "sigmoid" (normalised to sum to 1 over the experts).

    Returns:
        float32 [T, E].

    Raises:
        ValueError: unknown kind.
    """
    logits = logits.float()
    if kind == "softmax":
        return logits.softmax(-1)
    if kind == "sigmoid":
        # Decision: sigmoid routers are normalised over the experts. In log space no row can underflow to 0 / 0.
        return torch.nn.functional.logsigmoid(logits).softmax(-1)
    raise ValueError(f'router kind "{kind}" is unknown; known: softmax, sigmoid')


def sample_mean(probabilities: Tensor, keep: Tensor, observed: Tensor | None = None) -> Tensor:
    """G of every sample: the mean of its tokens' routing probabilities. Padding never counts, not even as NaN.

    A sample without a kept token has no routing and is dropped: the result has B' <= B rows, in the order of the
    samples, and may have none.

    Args:
        probabilities: [T, E], sample after sample.
        keep: bool [B, T / B], False for padding.
        observed: int64 [B'], the samples with a kept token, if already known; to compute them waits for the GPU.

    Returns:
        float32 [B', E].

    Raises:
        ValueError: the shapes do not agree.
    """
    if probabilities.dim() != 2 or keep.dim() != 2 or keep.numel() != len(probabilities):
        raise ValueError(
            f"expected probabilities [T, E] and keep [B, T / B], got {tuple(probabilities.shape)} and "
            f"{tuple(keep.shape)}"
        )
    # Decision: G of a sample is the mean over its non-padding tokens of the probability over all experts.
    kept = torch.where(keep.reshape(-1, 1), probabilities.detach().float(), 0.0)
    mean = kept.view(*keep.shape, -1).sum(1) / keep.sum(1, keepdim=True)
    return mean[keep.any(1) if observed is None else observed]


def cumulative(g: Tensor) -> Tensor:
    """How useful each expert is in general: [B, E] -> float32 [E], eq. 3. ValueError unless g is [B >= 1, E]."""
    return _checked(g).mean(0)


def specific(g: Tensor) -> Tensor:
    """How decisive each expert is for its best sample: [B, E] -> float32 [E], eq. 4. ValueError as `cumulative`."""
    return _checked(g).amax(0)


def importance(g: Tensor, lam: float = 0.5) -> Tensor:
    """Importance s: [B, E] -> float32 [E], eq. 5. ValueError as `cumulative`, or if lam is not in [0, 1]."""
    if not 0 <= lam <= 1:
        raise ValueError(f"lam={lam} is not in [0, 1]")
    return lam * cumulative(g) + (1 - lam) * specific(g)


def redundancy(g: Tensor) -> Tensor:
    """How far an expert depends on the sample, >= 0: [B, E] -> float32 [E], eq. 11. ValueError as `cumulative`."""
    g = _checked(g)
    mean = g.mean(0).clamp_min(torch.finfo(g.dtype).tiny)  # an expert nobody routes to: 0 log(0 / tiny) = 0
    return torch.xlogy(g, g / mean).mean(0).clamp_min(0.0)  # rounding can leave about -1e-9


def ib_contribution(g: Tensor, lam: float = 0.5, beta: float = 0.5) -> Tensor:
    """Information-bottleneck contribution I: [B, E] -> float32 [E], eq. 14. ValueError as `importance`."""
    return importance(g, lam) - beta * redundancy(g)


def _checked(g: Tensor) -> Tensor:
    if g.dim() != 2 or g.shape[0] == 0:
        raise ValueError(f"expected routing probabilities [B, E] of at least one sample, got {tuple(g.shape)}")
    return g.detach().float()
