"""Sort (token, expert) pairs by expert, so that each expert works on one contiguous group of rows."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Groups:
    """The pairs of a layer's batch, sorted by expert. `S` pairs, `T` tokens, at most `K` pairs per token.

    Pairs whose expert is absent are left out.
    """

    num_tokens: int
    token: Tensor
    """int64 [S]: the token of each pair."""
    pair: Tensor
    """int64 [S]: the index of each pair in the flattened `[T, K]` routing tensors."""
    spans: list[tuple[int, int, int]]
    """(expert, start, end) for every expert with at least one pair, in rows of the sorted pairs."""
    num_experts: int
    ends: Tensor
    """int32 [E]: where the rows of each expert end, in rows of the sorted pairs; for torch's grouped products."""
    places: Tensor
    """int64 [T, K]: the index of each token's pairs in the sorted order; S or more for pairs that are left out."""

    @property
    def size(self) -> int:
        """S, the number of pairs."""
        return self.token.shape[0]

    def sum_per_token(self, rows: Tensor) -> Tensor:
        """Add up the rows [S, D] of all pairs per token: [T, D], at least in float32, always in the same order.

        `index_add_` is not used: on a GPU its order changes from run to run.
        """
        if self.size == 0:
            return rows.new_zeros(self.num_tokens, rows.shape[1])
        first, *others = self.places.unbind(1)
        out = self._rows_at(rows, first)
        if len(others) > 1:  # a single addition rounds once, in any precision
            out = out.to(torch.promote_types(rows.dtype, torch.float32))
        for place in others:
            out += self._rows_at(rows, place)
        return out.to(rows.dtype)

    def _rows_at(self, rows: Tensor, place: Tensor) -> Tensor:
        """rows [S, D] at places [T], in new memory; zeros for pairs that are left out."""
        if self.is_whole:
            return rows.index_select(0, place)
        return rows.index_select(0, place.clamp(max=self.size - 1)).masked_fill_(place[:, None] >= self.size, 0.0)

    @property
    def is_whole(self) -> bool:
        """Whether no pair is left out."""
        return self.size == self.places.numel()

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Views of `rows` [S, ...], one per group, in the order of `spans`."""
        return rows.split([end - start for _, start, end in self.spans])


def group_pairs(experts: Tensor, num_experts: int, top_k: int, keep: Tensor | None = None) -> Groups:
    """Group the flattened pairs `experts` int64 [T*K] by expert; values outside [0, num_experts) mean "no expert".

    `keep` bool [num_experts] restricts the groups to some experts. Needs one host synchronisation.
    """
    num_pairs = experts.shape[0]
    absent = (experts < 0) | (experts >= num_experts)
    ids = experts.masked_fill(absent, num_experts)
    if keep is not None:
        table = torch.cat([keep, keep.new_zeros(1)])
        ids = ids.masked_fill(~table[ids], num_experts)
    ids, order = torch.sort(ids, stable=True)
    ends = torch.searchsorted(ids, torch.arange(num_experts, device=ids.device), right=True, out_int32=True)
    spans: list[tuple[int, int, int]] = []
    start = 0
    for expert, end in enumerate(ends.tolist()):  # the one synchronisation
        if end > start:
            spans.append((expert, start, end))
            start = end
    places = torch.empty_like(order)
    places[order] = torch.arange(num_pairs, device=order.device)
    pair = order[:start]
    return Groups(num_pairs // top_k, pair // top_k, pair, spans, num_experts, ends, places.view(-1, top_k))
