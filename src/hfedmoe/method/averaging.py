"""Streaming weighted averages (equations 17 and 21): clients are added one at a time and not kept.

    W    <- W + w
    mean <- mean + w / W * (x - mean)        W and mean start at 0, so the first share is 1 and gives x itself

In float32, this form returns exactly the same bits if all clients sent the same rows, for any weights. The order of
clients matters only by rounding. So does a tree: an average of some clients can be merged into that of others, as one
client whose weight is the sum of theirs. Memory: one float32 buffer of the size of the rows. Time: sent rows are read
once, and their rows in the buffer are read and written once.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hfedmoe.method.neighbours import Runs, runs_of


class StacksAverage:
    """The weighted average of each row (expert) over the clients that sent it, for many stacks at once.

    Rows are numbered over all layers, and every stack covers the rows of one layer: a client sends the same rows of all
    stacks of a layer, with the same weights.

    Args:
        stretches: the first row of each stack and its number of rows, by name.
    """

    def __init__(self, stretches: Mapping[str, tuple[int, int]]) -> None:
        self._stretches = dict(stretches)
        self._names: dict[tuple[int, int], list[str]] = {}
        for name, stretch in stretches.items():
            self._names.setdefault(stretch, []).append(name)
        self.num_rows = max((first + number for first, number in stretches.values()), default=0)
        self._weight = torch.zeros(self.num_rows)
        self._means: dict[str, Tensor] = {}

    def add(self, stacks: Mapping[str, Tensor], index: Tensor, weight: Tensor, checked: bool = False) -> None:
        """Add some rows of one client; rows of weight 0 are ignored.

        Args:
            stacks: all stacks by name, [n, ...] each: the rows of `index` that belong to it, in the same order.
            index: int64, which rows were sent, ascending.
            weight: of the same length, not negative.
            checked: the caller has checked that all rows are finite (this takes a pass over them), that index and
                weights are in range, and that the index ascends.

        Raises:
            ValueError: shapes or names that do not agree, an index twice or out of range, a weight that is negative
                or not finite, or a row of positive weight that is not finite. Nothing is added then.
        """
        if stacks.keys() != self._stretches.keys():
            raise ValueError(f"stacks {sorted(stacks)} differ from the expected {sorted(self._stretches)}")
        if not checked:
            check_rows(self.num_rows, index, weight)
            if not _ascends(index):
                raise ValueError("the index must ascend")
        sent = self._sent(index.tolist())
        for name, stack in stacks.items():
            if len(stack) != len(sent[self._stretches[name]]):
                raise ValueError(f"{name} has {len(stack)} rows, but {len(sent[self._stretches[name]])} were expected")
        weight = weight.detach().float()
        if not bool(weight.all()):
            keep = weight > 0
            stacks = {name: stack[keep[sent[self._stretches[name]].places]] for name, stack in stacks.items()}
            index, weight = index[keep], weight[keep]
            sent = self._sent(index.tolist())
        rows = {name: _plain(stack) for name, stack in stacks.items()}
        self._check(rows, checked)
        if not self._means:
            numbers = {name: number for name, (_, number) in self._stretches.items()}
            self._means = {name: r.new_zeros(numbers[name], *r.shape[1:]) for name, r in rows.items()}
        if len(index) == 0:
            return
        total = self._weight[index] + weight
        self._weight[index] = total
        share = (weight / total)[:, None]
        into: list[Tensor] = []
        new: list[Tensor] = []
        shares: list[Tensor] = []
        for stretch, own in sent.items():
            if not own.lengths:
                continue
            number, parts = len(own), share[own.places].split_with_sizes(own.lengths)
            for name in self._names[stretch]:
                flat, sent_rows = self._means[name].view(stretch[1], -1), rows[name].view(number, -1)
                into += flat.split_with_sizes(own.cuts)[1::2]
                if flat.device == share.device:
                    new += sent_rows.split_with_sizes(own.lengths)
                    shares += parts
                else:
                    new += sent_rows.to(flat.device).split_with_sizes(own.lengths)
                    shares += [part.to(flat.device) for part in parts]
        # One call for all runs of neighbouring rows: no gathered copy of the buffer, and no loop in Python over rows.
        torch._foreach_lerp_(into, new, shares)

    def merge(self, other: "StacksAverage") -> None:
        """Add all clients of another average, as one client whose weights are their sums: up to rounding the same.

        Raises ValueError if the other one has other stacks.
        """
        if other._stretches != self._stretches:
            raise ValueError("averages of different stacks cannot be merged")
        index = other._weight.nonzero()[:, 0]
        if not len(index):
            return
        stacks = {}
        for name, mean in other._means.items():
            first, number = self._stretches[name]
            stacks[name] = mean[(index[(index >= first) & (index < first + number)] - first).to(mean.device)]
        self.add(stacks, index, other._weight[index], checked=True)

    def _sent(self, index: list[int]) -> dict[tuple[int, int], Runs]:
        """The sent rows of every stretch."""
        return {stretch: runs_of(index, *stretch) for stretch in self._names}

    def _check(self, rows: dict[str, Tensor], checked: bool) -> None:
        for name, mean in self._means.items():
            if rows[name].shape[1:] != mean.shape[1:]:
                raise ValueError(f"rows {tuple(rows[name].shape[1:])} differ from the earlier {tuple(mean.shape[1:])}")
        if not checked and not all(_finite(r) for r in rows.values()):
            raise ValueError("a row to average is not finite")

    def result(self, previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The averages, in the dtype of previous [E, ...]; rows nobody sent keep `previous` bit for bit.

        Call it once, at the end: float32 averages are returned without a copy.

        Raises ValueError if the shapes of `previous` are not those of the rows.
        """
        averages = {}
        for name, before in previous.items():
            first, number = self._stretches[name]
            shape = (number, *(self._means[name].shape[1:] if self._means else before.shape[1:]))
            if before.shape != shape:
                raise ValueError(f"the previous rows are {tuple(before.shape)}, not {shape}")
            if not self._means:
                averages[name] = before.detach().clone()
                continue
            untouched = (self._weight[first : first + number] == 0).to(before.device)
            average = self._means[name].to(before)
            average[untouched] = before.detach()[untouched]
            averages[name] = average
        return averages


class RowAverage:
    """The weighted average of each row over the clients that sent it: a `StacksAverage` of one stack."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._stacks = StacksAverage({"rows": (0, num_rows)})

    def add(self, rows: Tensor, index: Tensor, weight: Tensor, checked: bool = False) -> None:
        """Add some rows [n, ...] of one client, in any order; arguments and errors as `StacksAverage.add`."""
        if not checked:
            check_rows(self.num_rows, index, weight)
        if not _ascends(index) and len(rows) == len(index):
            order = index.argsort()
            rows, index, weight = rows[order], index[order], weight[order]
        self._stacks.add({"rows": rows}, index, weight, checked)

    def merge(self, other: "RowAverage") -> None:
        """As `StacksAverage.merge`."""
        self._stacks.merge(other._stacks)

    def result(self, previous: Tensor) -> Tensor:
        """The averages, as `StacksAverage.result`."""
        return self._stacks.result({"rows": previous})["rows"]


class MeanAverage:
    """The weighted average of a whole tensor over clients: FedAvg of gates and of everything that is shared."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._mean: Tensor | None = None

    def add(self, tensor: Tensor, weight: float | Tensor, checked: bool = False) -> None:
        """Add one client's tensor [...] with a scalar weight; weight 0 is ignored.

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

    def merge(self, other: "MeanAverage") -> None:
        """Add all clients of another average, as one client whose weight is their sum: up to rounding the same.

        Raises ValueError if its tensors have another shape.
        """
        if other._mean is not None:
            self.add(other._mean, other._weight, checked=True)

    def result(self, previous: Tensor) -> Tensor:
        """The average in the dtype of `previous` [...], or `previous` bit for bit if all weights are 0.

        Call it once, at the end. Raises ValueError if the shape of `previous` is not that of the tensors.
        """
        if self._mean is None:
            return previous.detach().clone()
        if previous.shape != self._mean.shape:
            raise ValueError(f"the previous tensor is {tuple(previous.shape)}, not {tuple(self._mean.shape)}")
        return self._mean.to(previous)


def positive_weights(num_rows: int, num_sent: int, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Index and float32 weight of the rows of positive weight, and the mask [n] of those rows."""
    if index.shape != (num_sent,):
        raise ValueError(f"{num_sent} rows need as many indices and weights, got {tuple(index.shape)} indices")
    check_rows(num_rows, index, weight)
    weight = weight.detach().float()
    keep = weight > 0
    return index[keep.to(index.device)], weight[keep], keep


def check_rows(num_rows: int, index: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless the index is in range and without duplicates, and every row has a valid weight."""
    if index.dim() != 1 or weight.shape != index.shape:
        raise ValueError(
            f"rows need as many indices and weights, got {tuple(index.shape)} indices and {tuple(weight.shape)} weights"
        )
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < num_rows:
        raise ValueError(f"row index out of range: {int(index.min())}..{int(index.max())} of {num_rows} rows")
    if len(index.unique()) != len(index):
        raise ValueError("a row index occurs twice")
    if not (weight.detach().float().isfinite() & (weight >= 0)).all():
        raise ValueError("a weight is negative or not finite")


def _plain(tensor: Tensor) -> Tensor:
    """The values in float32, contiguous; the same tensor if it already is."""
    if tensor.dtype == torch.float32 and not tensor.requires_grad and tensor.is_contiguous():
        return tensor
    return tensor.detach().float().contiguous()


def _ascends(index: Tensor) -> bool:
    return bool((index.diff() > 0).all())


def _finite(tensor: Tensor) -> bool:
    """Whether all elements are finite, in one pass and without a temporary: NaN and infinity show in the extremes."""
    return tensor.numel() == 0 or all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))
