"""LoRA pairs of several ranks: on every client its own, on the server the largest, R.

A pair is A [..., R, in] and B [..., out, R], and stands for the product B A. All ranks have the same scale, so that a
product means the same on every device.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hfedmoe.method.averaging import StacksAverage, check_rows


@dataclass(frozen=True)
class Ranks:
    """How a method lets clients train LoRA pairs of a lower rank."""

    of: Callable[[float, int], int]
    """A client's rank: (share of all experts in its budget, R) -> 1 to R."""
    exact: bool
    """Whether the server averages products and sends a client the nearest ones of its rank (`nearest`); or averages the
    factors, padded with zeros, and sends their first rows and columns (`first`)."""
    weight: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda a, b, weight: weight
    """What copies of pairs count: (A [n, r, in], B [n, out, r], weights of the experts [n]) -> float32 [n]."""

    def lowered(self, a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """What a client of a rank gets of pairs of rank R."""
        if rank == a.shape[-2]:
            return a, b
        return nearest(a, b, rank) if self.exact else first(a, b, rank)


def by_share(share: float, rank: int) -> int:
    """As large a share of R as the client's budget has of all experts, one at least."""
    return max(1, min(rank, round(share * rank)))


def first(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first rows of A and columns of B."""
    return a[..., :rank, :], b[..., :rank]


def nearest(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Pairs of a lower rank whose product is nearest to B A; its largest directions come first.

    The rows of the new A are orthogonal and have the root mean square norm of the old ones, with signs as in
    `products.ProductAverage`. If B A is 0, any A would do: then these are the first rows.
    """
    q_b, r_b = torch.linalg.qr(b.float())
    q_a, r_a = torch.linalg.qr(a.float().mT)
    u, s, vt = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    u, s, vt = (q_b @ u)[..., :rank], s[..., :rank], (vt @ q_a.mT)[..., :rank, :]
    largest = vt.gather(-1, vt.abs().argmax(-1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    size = torch.linalg.matrix_norm(a.float())[..., None, None] / a.shape[-2] ** 0.5
    scale = torch.where(size > 0, size, 1.0)
    spare = rank - s.shape[-1]  # a matrix smaller than the rank has fewer directions
    new_a = torch.nn.functional.pad(vt * sign * scale, (0, 0, 0, spare))
    new_b = torch.nn.functional.pad(u * (sign.mT * s[..., None, :] / scale), (0, spare))
    empty = (s[..., :1] == 0)[..., None]
    old_a, old_b = first(a, b, rank)
    return torch.where(empty, old_a.float(), new_a).to(a), torch.where(empty, old_b.float(), new_b).to(b)


def product_norm(a: Tensor, b: Tensor) -> Tensor:
    """The Frobenius norm of B A, without the product: float32 [...]."""
    a, b = a.float(), b.float()
    return ((b.mT @ b) * (a @ a.mT)).sum((-2, -1)).clamp_min(0.0).sqrt()


class PaddedAverage:
    """The weighted average of each expert's A and B, where pairs of a lower rank are padded with zeros.

    Rows of A and columns of B beyond the largest rank that sent the expert keep their value: nobody trained them.
    """

    def __init__(self, num_rows: int, rank: int) -> None:
        self.num_rows, self.rank = num_rows, rank
        self._mean = StacksAverage({"a": (0, num_rows), "b": (0, num_rows)})
        self._most = torch.zeros(num_rows, dtype=torch.int64)

    def add(self, a: Tensor, b: Tensor, index: Tensor, weight: Tensor) -> None:
        """Add the pairs of some experts of one client; pairs of weight 0 are ignored.

        Args:
            a: [n, r, in], with r at most R.
            b: [n, out, r].
            index: int64 [n], which of the `num_rows` experts each one is, ascending.
            weight: [n], not negative.

        Raises:
            ValueError: as `StacksAverage.add`, or factors of a rank above R or of two ranks.
        """
        rank = a.shape[1] if a.dim() == 3 else 0
        if not 0 < rank <= self.rank or b.dim() != 3 or b.shape[2] != rank:
            raise ValueError(f"expected a [n, r, in] and b [n, out, r], got {tuple(a.shape)} and {tuple(b.shape)}")
        check_rows(self.num_rows, index, weight)
        pad, missing = torch.nn.functional.pad, self.rank - rank
        self._mean.add({"a": pad(a, (0, 0, 0, missing)), "b": pad(b, (0, missing))}, index, weight)
        counted = index[weight > 0].to(self._most.device)
        self._most[counted] = self._most[counted].clamp_min(rank)

    def result(self, previous_a: Tensor, previous_b: Tensor) -> tuple[Tensor, Tensor]:
        """The averages, in the dtypes of previous_a [E, R, in] and previous_b [E, out, R]. Call it once, at the end."""
        new = self._mean.result({"a": previous_a, "b": previous_b})
        kept = (torch.arange(self.rank) >= self._most[:, None]).to(previous_a.device)
        return torch.where(kept[:, :, None], previous_a, new["a"]), torch.where(kept[:, None], previous_b, new["b"])
