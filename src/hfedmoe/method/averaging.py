"""Streaming weighted averages (equations 17 and 21): one client at a time is folded in and forgotten.

    W    <- W + w
    mean <- mean + w / W * (x - mean)        the first contribution is copied

This form, in float32, returns the very same bits when all clients sent the same rows, whatever their weights, and
depends on the order of clients only by rounding. Memory: one float32 buffer of the size of the rows.
"""

import torch
from torch import Tensor


class RowAverage:
    """The weighted average of each row (expert) over the clients that sent it."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._weight: Tensor | None = None
        self._mean: Tensor | None = None

    def add(self, rows: Tensor, index: Tensor, weight: Tensor) -> None:
        """Fold in some rows of one client; rows of weight 0 are ignored.

        Args:
            rows: [n, ...].
            index: int64 [n], which of the `num_rows` rows each one is; no row twice.
            weight: [n], not negative.

        Raises:
            ValueError: shapes that do not agree, an index twice or out of range, a weight that is negative or not
                finite, or a row of positive weight that is not finite. Nothing has been folded in then.
        """
        index, weight, keep = positive_weights(self.num_rows, len(rows), index, weight)
        rows = rows.detach()[keep.to(rows.device)].float()
        if self._mean is not None and rows.shape[1:] != self._mean.shape[1:]:
            raise ValueError(f"rows {tuple(rows.shape[1:])} differ from the earlier {tuple(self._mean.shape[1:])}")
        if not rows.isfinite().all():
            raise ValueError("a row to average is not finite")
        if self._mean is None or self._weight is None:
            self._mean = rows.new_zeros(self.num_rows, *rows.shape[1:])
            self._weight = rows.new_zeros(self.num_rows)
        rows, index, weight = (x.to(self._mean.device) for x in (rows, index, weight))
        before = self._weight[index]
        total = before + weight
        mean = self._mean[index]
        column = (-1, *[1] * (rows.dim() - 1))
        step = mean + (weight / total).view(column) * (rows - mean)
        self._mean[index] = torch.where((before == 0).view(column), rows, step)
        self._weight[index] = total

    def result(self, previous: Tensor) -> Tensor:
        """The averages, in the dtype of previous [num_rows, ...]; rows nobody sent keep `previous` bit for bit.

        Raises ValueError if the shape of `previous` is not that of the rows.
        """
        result = previous.detach().clone()
        shape = (self.num_rows, *(previous.shape[1:] if self._mean is None else self._mean.shape[1:]))
        if previous.shape != shape:
            raise ValueError(f"the previous rows are {tuple(previous.shape)}, not {shape}")
        if self._mean is not None and self._weight is not None:
            touched = self._weight > 0
            result[touched.to(result.device)] = self._mean[touched].to(result)
        return result


class MeanAverage:
    """The weighted average of a whole tensor over clients: FedAvg of gates and of everything that is shared."""

    def __init__(self) -> None:
        self._rows = RowAverage(1)

    def add(self, tensor: Tensor, weight: float | Tensor) -> None:
        """Fold in one client's tensor [...] with a scalar weight; 0 is ignored. ValueError as `RowAverage.add`."""
        weight = torch.as_tensor(weight, dtype=torch.float32).reshape(1)
        self._rows.add(tensor[None], torch.zeros(1, dtype=torch.int64), weight)

    def result(self, previous: Tensor) -> Tensor:
        """The average in the dtype of `previous` [...], or `previous` bit for bit if nobody counted.

        Raises ValueError if the shape of `previous` is not that of the tensors.
        """
        return self._rows.result(previous[None])[0]


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
