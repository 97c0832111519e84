"""Streaming weighted averages (equations 17 and 21): one client at a time is folded in and forgotten.

    W    <- W + w
    mean <- mean + w / W * (x - mean)        the first contribution is copied

This form, in float32, returns the very same bits when all clients sent the same rows, whatever their weights, and
depends on the order of clients only by rounding. Memory: one float32 buffer of the size of the rows. Time: what was
sent is read once, and the rows of the buffer that it belongs to are read and written once.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class StacksAverage:
    """The weighted average of each row (expert) over the clients that sent it, for several stacks at once.

    The stacks (the kinds of tensors of one layer's experts) have one row per expert each, so a client sends the same
    rows of all of them, with the same weights.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._weight = torch.zeros(num_rows)
        self._means: dict[str, Tensor] = {}

    def add(self, stacks: Mapping[str, Tensor], index: Tensor, weight: Tensor, checked: bool = False) -> None:
        """Fold in some rows of one client; rows of weight 0 are ignored.

        Args:
            stacks: by name, [n, ...] each; every client sends the same names.
            index: int64 [n], which of the `num_rows` rows each one is; no row twice.
            weight: [n], not negative.
            checked: the caller has seen to it that all rows are finite, which takes a pass over them, that index and
                weights are in range, and that no row comes twice.

        Raises:
            ValueError: shapes or names that do not agree, an index twice or out of range, a weight that is negative
                or not finite, or a row of positive weight that is not finite. Nothing has been folded in then.
        """
        sent = {len(rows) for rows in stacks.values()}
        if len(sent) != 1:
            raise ValueError(f"expected the same number of rows in every stack, got {sorted(sent)}")
        if checked and bool(weight.all()):
            rows = {name: stack.float() for name, stack in stacks.items()}
        else:
            index, weight, keep = positive_weights(self.num_rows, sent.pop(), index, weight)
            rows = {name: stack.detach()[keep.to(stack.device)].float() for name, stack in stacks.items()}
        self._check(rows, checked)
        if not self._means:
            self._means = {name: r.new_zeros(self.num_rows, *r.shape[1:]) for name, r in rows.items()}
        if len(index) == 0:
            return
        total = self._weight[index] + weight
        self._weight[index] = total
        runs = _runs(index.tolist())
        lengths = [length for _, length in runs]
        share = (weight / total)[:, None]
        parts = share.split_with_sizes(lengths)
        into: list[Tensor] = []
        new: list[Tensor] = []
        shares: list[Tensor] = []
        for name, mean in self._means.items():
            flat = mean.view(self.num_rows, -1)
            into += [flat.narrow(0, start, length) for start, length in runs]
            new += rows[name].to(mean.device).reshape(len(index), -1).split_with_sizes(lengths)
            shares += parts if mean.device == share.device else [part.to(mean.device) for part in parts]
        # One call for all runs of neighbouring rows: no gathered copy of the buffer, and no loop in Python over rows.
        torch._foreach_lerp_(into, new, shares)

    def _check(self, rows: dict[str, Tensor], checked: bool) -> None:
        if self._means and rows.keys() != self._means.keys():
            raise ValueError(f"stacks {sorted(rows)} differ from the earlier {sorted(self._means)}")
        for name, mean in self._means.items():
            if rows[name].shape[1:] != mean.shape[1:]:
                raise ValueError(f"rows {tuple(rows[name].shape[1:])} differ from the earlier {tuple(mean.shape[1:])}")
        if not checked and not all(_finite(r) for r in rows.values()):
            raise ValueError("a row to average is not finite")

    def result(self, previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The averages, in the dtype of previous [num_rows, ...]; rows nobody sent keep `previous` bit for bit.

        Call it once, at the end: float32 averages are handed over, not copied.

        Raises ValueError if the shapes of `previous` are not those of the rows.
        """
        untouched = self._weight == 0
        averages = {}
        for name, before in previous.items():
            shape = (self.num_rows, *(self._means[name].shape[1:] if self._means else before.shape[1:]))
            if before.shape != shape:
                raise ValueError(f"the previous rows are {tuple(before.shape)}, not {shape}")
            if not self._means:
                averages[name] = before.detach().clone()
                continue
            average = self._means[name].to(before)
            average[untouched.to(before.device)] = before.detach()[untouched.to(before.device)]
            averages[name] = average
        return averages


class RowAverage:
    """The weighted average of each row over the clients that sent it: a `StacksAverage` of one stack."""

    def __init__(self, num_rows: int) -> None:
        self._stacks = StacksAverage(num_rows)

    def add(self, rows: Tensor, index: Tensor, weight: Tensor, checked: bool = False) -> None:
        """Fold in some rows [n, ...] of one client; arguments and errors as `StacksAverage.add`."""
        self._stacks.add({"rows": rows}, index, weight, checked)

    def result(self, previous: Tensor) -> Tensor:
        """The averages, as `StacksAverage.result`."""
        return self._stacks.result({"rows": previous})["rows"]


class MeanAverage:
    """The weighted average of a whole tensor over clients: FedAvg of gates and of everything that is shared."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._mean: Tensor | None = None

    def add(self, tensor: Tensor, weight: float | Tensor, checked: bool = False) -> None:
        """Fold in one client's tensor [...] with a scalar weight; 0 is ignored.

        Raises ValueError as `StacksAverage.add`.
        """
        weight = float(weight)
        if not 0 <= weight < float("inf"):
            raise ValueError("a weight is negative or not finite")
        if weight == 0:
            return
        new = tensor.detach().float()
        if self._mean is not None and new.shape != self._mean.shape:
            raise ValueError(f"a tensor {tuple(new.shape)} differs from the earlier {tuple(self._mean.shape)}")
        if not checked and not _finite(new):
            raise ValueError("a tensor to average is not finite")
        self._weight += weight
        if self._mean is None:
            self._mean = new.clone()
        else:
            self._mean.lerp_(new.to(self._mean.device), weight / self._weight)

    def result(self, previous: Tensor) -> Tensor:
        """The average in the dtype of `previous` [...], or `previous` bit for bit if nobody counted.

        Call it once, at the end. Raises ValueError if the shape of `previous` is not that of the tensors.
        """
        if self._mean is None:
            return previous.detach().clone()
        if previous.shape != self._mean.shape:
            raise ValueError(f"the previous tensor is {tuple(previous.shape)}, not {tuple(self._mean.shape)}")
        return self._mean.to(previous)


def positive_weights(num_rows: int, num_sent: int, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Index and float32 weight of the rows of positive weight, and the mask [n] of those rows."""
    if index.shape != (num_sent,) or weight.shape != (num_sent,):
        raise ValueError(
            f"{num_sent} rows need as many indices and weights, got {tuple(index.shape)} and {tuple(weight.shape)}"
        )
    if num_sent and not 0 <= int(index.min()) <= int(index.max()) < num_rows:
        raise ValueError(f"row index out of range: {int(index.min())}..{int(index.max())} of {num_rows} rows")
    if len(index.unique()) != num_sent:
        raise ValueError("a row index occurs twice")
    weight = weight.detach().float()
    if not (weight.isfinite() & (weight >= 0)).all():
        raise ValueError("a weight is negative or not finite")
    keep = weight > 0
    return index[keep.to(index.device)], weight[keep], keep


def _runs(index: list[int]) -> list[tuple[int, int]]:
    """(first, length) of the stretches of an index that go up by one."""
    starts = [at for at, row in enumerate(index) if at == 0 or row != index[at - 1] + 1]
    ends = [*starts[1:], len(index)]
    return [(index[start], end - start) for start, end in zip(starts, ends, strict=True)]


def _finite(tensor: Tensor) -> bool:
    """Whether all elements are finite, in one pass and without a temporary: NaN and infinity show in the extremes."""
    return tensor.numel() == 0 or all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))
