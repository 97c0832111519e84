"""Fold the gates (routers) of a round, by importance, by row or by examples (equations 18-21)."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from hfedmoe.config import MethodConfig
from hfedmoe.method.aggregation import MeanAverage, RowAverage, gate_alpha_numerator, gate_row_weights
from hfedmoe.moe.payload import layer_of
from hfedmoe.wire.messages import Update


class GateFold:
    """Streaming average of the tensors `router.{layer}.*` of all layers.

    Args:
        names: of the tensors.
        method: gate rule, tau.
    """

    def __init__(self, names: Iterable[str], method: MethodConfig) -> None:
        self._method = method
        self._rows: dict[str, RowAverage] = {}
        self._whole = {name: _ByImportance() for name in names}

    def add(self, update: Update) -> None:
        """Fold in one checked update and keep nothing of it."""
        alphas = [0.0] * len(update.usage)  # rule "fedavg": by examples
        rows: list[Tensor] = []
        if self._method.gate != "fedavg":
            weigh = partial(gate_alpha_numerator, tau=self._method.tau)
            alphas = torch.stack(over_layers(weigh, update.usage, update.importance)).tolist()
        if self._method.gate == "rows":
            weigh_rows = partial(gate_row_weights, tau=self._method.tau)
            rows = over_layers(weigh_rows, update.usage, update.importance, update.trained)
        for name, whole in self._whole.items():
            tensor, layer = update.tensors[name], layer_of(name)
            number = _num_rows(tensor, len(rows[layer])) if rows else 0
            if number:
                own = self._rows.setdefault(name, RowAverage(number))
                own.add(tensor[:number], torch.arange(number), rows[layer], checked=True)
            rest = tensor[number:] if number else tensor
            if rest.numel():
                whole.add(rest, alphas[layer], update.examples)

    def result(self, previous: dict[str, Tensor]) -> dict[str, Tensor]:
        """The new tensors; what nobody's update counts for keeps its value bit for bit."""
        new = {}
        for name, whole in self._whole.items():
            before, rows = previous[name], self._rows.get(name)
            if rows is None:
                new[name] = whole.result(before)
                continue
            by_row = rows.result(before[: rows.num_rows])
            rest = before[rows.num_rows :]
            new[name] = torch.cat([by_row, whole.result(rest)]) if rest.numel() else by_row
        return new


class _ByImportance:
    """The mean of a tensor by alpha (eq. 21); by examples where every alpha is 0."""

    def __init__(self) -> None:
        self._by_alpha = MeanAverage()
        self._by_examples: MeanAverage | None = MeanAverage()
        """Until a client's alpha is not 0."""

    def add(self, tensor: Tensor, alpha: float, examples: int) -> None:
        if alpha > 0:
            self._by_alpha.add(tensor, alpha, checked=True)
            self._by_examples = None
        elif self._by_examples is not None:
            self._by_examples.add(tensor, examples, checked=True)

    def result(self, previous: Tensor) -> Tensor:
        mean = self._by_alpha if self._by_examples is None else self._by_examples
        return mean.result(previous)


def _num_rows(tensor: Tensor, num_experts: int) -> int:
    """How many rows of a router's tensor belong to an expert each, from the first on.

    Decision: a matrix has a row for each expert, and may have more for what the router scores beside them (identities,
    shared experts); a vector has an entry for each expert or is something else, such as a scale of the input. What
    belongs to no expert is averaged by importance.
    """
    fits = tensor.dim() > 1 and len(tensor) >= num_experts
    return num_experts if fits or tensor.shape == (num_experts,) else 0


def over_layers(rule: Callable[..., Tensor], *vectors: list[Tensor]) -> list[Tensor]:
    """What `rule` makes of the vectors [E] of each layer, for all layers at once where they have as many experts.

    Args:
        rule: takes one [..., E] for each of `vectors`.
        vectors: a list over the layers each.
    """
    if len({len(vector) for vector in vectors[0]}) == 1:
        return list(rule(*map(torch.stack, vectors)).unbind(0))
    return [rule(*layer) for layer in zip(*vectors, strict=True)]
