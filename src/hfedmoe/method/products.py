"""The streaming average of LoRA pairs by their product (FlexLoRA): `lora = "exact"`.

The mean of B A is not the product of the means of B and A. Per expert,

    M = sum_c w_c B_c A_c / sum_c w_c,    M = U S V^T,    a = scale * V_R^T,    b = U_R S_R / scale

b a is M itself if its rank is at most R, and its best approximation of rank R otherwise. M is stored as the stack of
the clients' factors, and as the dense product once their ranks add up to more than min(out, in). The SVD of a stack
needs only that of a small core: B = Q_b R_b and A^T = Q_a R_a give M = Q_b (R_b R_a^T) Q_a^T.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hfedmoe.method.averaging import positive_weights


@dataclass
class _Products:
    """The weighted sum of the products of one expert: `pairs` of (a, b, w), or `dense` once they are too many."""

    pairs: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)
    dense: Tensor | None = None
    weight: float = 0.0

    def add(self, a: Tensor, b: Tensor, weight: float) -> None:
        self.weight += weight
        self.pairs.append((a, b, weight))
        too_many = sum(len(a) for a, _, _ in self.pairs) > min(len(b), a.shape[1])
        if self.dense is not None or (too_many and len(self.pairs) > 1):
            self._close()

    def merge(self, other: "_Products") -> None:
        """Add all products of another sum."""
        if other.dense is not None:
            self.dense = other.dense.clone() if self.dense is None else self.dense.add_(other.dense)
            self.weight += other.weight
            self._close()
        else:
            for pair in other.pairs:
                self.add(*pair)

    def _close(self) -> None:
        """Add what is stored as factors to the dense product."""
        for a, b, weight in self.pairs:
            product = weight * (b @ a)
            self.dense = product if self.dense is None else self.dense.add_(product)
        self.pairs = []

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [out, n], S [n], V^T [n, in] of the weighted mean product."""
        if self.dense is not None:
            u, s, vt = torch.linalg.svd(self.dense / self.weight, full_matrices=False)
            return u, s, vt
        q_b, r_b = torch.linalg.qr(torch.cat([b * (weight / self.weight) for _, b, weight in self.pairs], 1))
        q_a, r_a = torch.linalg.qr(torch.cat([a for a, _, _ in self.pairs]).T)
        u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        return q_b @ u, s, vt @ q_a.T


def product_norms(a: Tensor, b: Tensor) -> Tensor:
    """||B A||_F of every expert, without B A: a [n, R, in] and b [n, out, R] -> float32 [n].

    ||B A||^2 = tr(A^T B^T B A), the sum over the products of the entries of B^T B and A A^T.
    """
    a, b = a.detach().float(), b.detach().float()
    squares = ((b.mT @ b).double() * (a @ a.mT).double()).sum((1, 2))
    return squares.clamp_min(0).sqrt().float()  # rounding can make a product of 0 slightly negative


class ProductAverage:
    """The weighted average of each expert's product B A over the clients that sent it, as factors of rank R.

    Args:
        num_rows: experts.
        rank: R.
        ordered: components are ordered by their singular values also where only one client sent the expert, so that
            the first r are the best approximation of rank r.
    """

    def __init__(self, num_rows: int, rank: int, ordered: bool = False) -> None:
        self.num_rows = num_rows
        self.rank = rank
        self.ordered = ordered
        self._experts: dict[int, _Products] = {}
        self._shape: tuple[int, int] | None = None

    def add(self, a: Tensor, b: Tensor, index: Tensor, weight: Tensor) -> None:
        """Add the LoRA pairs of some experts of one client; pairs of weight 0 are ignored.

        Args:
            a: [n, R, in].
            b: [n, out, R].
            index: int64 [n], which of the `num_rows` experts each one is; no expert twice.
            weight: [n], not negative.

        Raises:
            ValueError: as `RowAverage.add`, or factors of another rank.
        """
        if a.dim() != 3 or b.dim() != 3 or len(a) != len(b) or a.shape[1] != self.rank or b.shape[2] != self.rank:
            raise ValueError(
                f"expected a [n, {self.rank}, in] and b [n, out, {self.rank}], "
                f"got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        index, weight, keep = positive_weights(self.num_rows, len(a), index, weight)
        shape = (b.shape[1], a.shape[2])
        if self._shape is not None and shape != self._shape:
            raise ValueError(f"products {shape} differ from the earlier {self._shape}")
        # Indexing with a mask copies: a view would keep the client's whole update alive.
        a = a.detach()[keep.to(a.device)].float()
        b = b.detach()[keep.to(b.device)].float()
        if not (a.isfinite().all() and b.isfinite().all()):
            raise ValueError("a factor to average is not finite")
        self._shape = shape
        for row, expert in enumerate(index.tolist()):
            self._experts.setdefault(expert, _Products()).add(a[row], b[row], float(weight[row]))

    def merge(self, other: "ProductAverage") -> None:
        """Add all clients of another average: up to rounding as if they had been added here.

        Raises ValueError if its experts or its rank are others.
        """
        if (other.num_rows, other.rank) != (self.num_rows, self.rank):
            raise ValueError("averages of other experts or of another rank cannot be merged")
        self._shape = self._shape or other._shape
        for expert, products in other._experts.items():
            self._experts.setdefault(expert, _Products()).merge(products)

    def result(self, previous_a: Tensor, previous_b: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of every expert's mean product, in the dtypes of previous_a [E, R, in] and previous_b [E, out, R].

        A new `a` has orthogonal rows and the Frobenius norm of the previous one, so that a learning rate keeps its
        meaning. The largest entry of each row is positive, which fixes the signs. `a` is never 0, even if the product
        is. An expert that exactly one client sent gets that client's factors unchanged (the same product), unless
        components are ordered; one that nobody sent keeps both factors bit for bit.

        Raises ValueError if the shapes of the previous factors are not those of the clients'.
        """
        expected = self._shape or (previous_b.shape[1], previous_a.shape[2])
        if previous_a.shape != (self.num_rows, self.rank, expected[1]) or previous_b.shape != (
            self.num_rows,
            expected[0],
            self.rank,
        ):
            raise ValueError(
                f"the previous factors {tuple(previous_a.shape)} and {tuple(previous_b.shape)} do not fit "
                f"{self.num_rows} products {expected} of rank {self.rank}"
            )
        new_a, new_b = previous_a.detach().clone(), previous_b.detach().clone()
        for expert, products in self._experts.items():
            if len(products.pairs) == 1 and not self.ordered:
                a, b, _ = products.pairs[0]
            else:
                a, b = self._factors(products, float(previous_a[expert].float().norm()))
            new_a[expert], new_b[expert] = a.to(new_a), b.to(new_b)
        return new_a, new_b

    def _factors(self, products: _Products, norm: float) -> tuple[Tensor, Tensor]:
        """a [R, in] of Frobenius norm `norm` (1 per row if it is 0) and b [out, R]."""
        u, s, vt = products.svd()
        u, s, vt = u[:, : self.rank], s[: self.rank], vt[: self.rank]
        largest = vt.gather(1, vt.abs().argmax(1, keepdim=True))
        sign = torch.where(largest < 0, -1.0, 1.0)
        scale = norm / len(s) ** 0.5 if norm > 0 else 1.0
        spare = self.rank - len(s)  # a product smaller than R has fewer directions: the rest is zeros
        pad = torch.nn.functional.pad
        return pad(vt * sign * scale, (0, 0, 0, spare)), pad(u * (sign[:, 0] * s / scale), (0, spare))
