"""Sort (token, expert) pairs by expert, so that each expert works on one contiguous group of rows."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass
class Groups:
    """The pairs of a layer's batch, sorted by expert. `S` pairs, `T` tokens, `K` pairs per token at most.

    Pairs whose expert is absent do not occur.
    """

    num_tokens: int
    token: Tensor
    """int64 [S]: the token of each pair."""
    pair: Tensor
    """int64 [S]: the pair's place in the flattened `[T, K]` routing tensors."""
    spans: list[tuple[int, int, int]]
    """(expert, start, end) for every expert with at least one pair, in rows of the sorted pairs."""
    num_experts: int
    places: Tensor | None = None
    """int64 [T, K]: where each token's pairs are among the sorted ones, if no pair is missing."""

    @property
    def size(self) -> int:
        return self.token.shape[0]

    @cached_property
    def ends(self) -> Tensor:
        """int32 [E]: where the rows of each expert end, in rows of the sorted pairs; for torch's grouped products."""
        ends, last = [0] * self.num_experts, 0
        for expert, _, end in self.spans:
            ends[expert] = end
        for expert, end in enumerate(ends):
            last = ends[expert] = max(last, end)
        return torch.tensor(ends, dtype=torch.int32, device=self.token.device)

    def sum_per_token(self, rows: Tensor) -> Tensor:
        """Add up the rows [S, D] of all pairs per token: [T, D], in the same order every time."""
        if self.places is None:
            return rows.new_zeros(self.num_tokens, rows.shape[1]).index_add_(0, self.token, rows)
        first, *others = self.places.unbind(1)
        out = rows.index_select(0, first)
        for place in others:
            out += rows.index_select(0, place)
        return out

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Views of `rows` [S, ...], one per group, in the order of `spans`."""
        return rows.split([end - start for _, start, end in self.spans])


def group_pairs(experts: Tensor, num_experts: int, top_k: int, keep: Tensor | None = None) -> Groups:
    """Group the flattened pairs `experts` int64 [T*K] by expert; values outside [0, num_experts) mean "no expert".

    `keep` bool [num_experts] restricts the groups to some experts. One host synchronisation in all.
    """
    num_pairs = experts.shape[0]
    absent = (experts < 0) | (experts >= num_experts)
    ids = experts.masked_fill(absent, num_experts)
    if keep is not None:
        table = torch.cat([keep, keep.new_zeros(1)])
        ids = ids.masked_fill(~table[ids], num_experts)
    order = torch.argsort(ids, stable=True)
    counts = torch.bincount(ids, minlength=num_experts + 1).tolist()
    spans: list[tuple[int, int, int]] = []
    start = 0
    for expert, count in enumerate(counts[:num_experts]):
        if count:
            spans.append((expert, start, start + count))
            start += count
    pair = order[:start]
    places = None
    if start == num_pairs:
        places = torch.empty_like(pair)
        places[pair] = torch.arange(num_pairs, device=pair.device)
        places = places.view(-1, top_k)
    return Groups(num_pairs // top_k, pair // top_k, pair, spans, num_experts, places)
