"""Average the gates (routers) of a round, as whole tensors or row by row (equations 19-21)."""

from collections.abc import Iterable

import torch
from torch import Tensor

from hfedmoe.config import MethodConfig
from hfedmoe.method.averaging import RowAverage
from hfedmoe.method.copies import Copies, over_layers
from hfedmoe.method.gates import GateAverage
from hfedmoe.method.methods import METHODS
from hfedmoe.method.usage import passes
from hfedmoe.moe.payload import layer_of


class GateFold:
    """Streaming average of the tensors `router.{layer}.*` of all layers.

    Args:
        names: of the tensors.
        settings: the method and its constants.
    """

    def __init__(self, names: Iterable[str], settings: MethodConfig) -> None:
        self._settings, self._method = settings, METHODS[settings.name]
        self._rows: dict[str, RowAverage] = {}
        self._whole = {name: GateAverage() for name in names}
        self._printed = self._method.gate_as_printed(settings)
        self._mass: list[float] = []
        self._union: list[Tensor] = []

    def add(self, tensors: dict[str, Tensor], layers: list[Copies]) -> None:
        """Fold in the checked tensors of one client, without keeping them; `layers`: its copies of the experts."""
        alphas = torch.stack(over_layers(lambda copies: self._method.gate_weight(copies, self._settings), layers))
        rows: list[Tensor] = []
        if self._method.gate_rows(layers[0], self._settings) is not None:
            rows = over_layers(self._row_weights, layers)
        if self._printed:
            self._note(alphas, layers)
        for name, whole in self._whole.items():
            tensor, layer = tensors[name], layer_of(name)
            number = _num_rows(tensor, len(rows[layer])) if rows else 0
            if number:
                own = self._rows.setdefault(name, RowAverage(number))
                own.add(tensor[:number], torch.arange(number), rows[layer], checked=True)
            rest = tensor[number:] if number else tensor
            if rest.numel():
                whole.add(rest, float(alphas[layer]), layers[layer].examples)

    def _note(self, alphas: Tensor, layers: list[Copies]) -> None:
        """Add up what eq. 20 needs of all clients: sum_e p_c(e), and the union S."""
        used = [passes(copies.usage, self._settings.tau) for copies in layers]
        self._mass = [a + b for a, b in zip(self._mass or [0.0] * len(layers), alphas.tolist(), strict=True)]
        self._union = [a | b for a, b in zip(self._union or used, used, strict=True)]

    def _row_weights(self, copies: Copies) -> Tensor:
        rows = self._method.gate_rows(copies, self._settings)
        assert rows is not None
        return rows

    def merge(self, other: "GateFold") -> None:
        """Add all clients of another fold of the same round."""
        for name, whole in self._whole.items():
            whole.merge(other._whole[name])
        for name, rows in other._rows.items():
            self._rows.setdefault(name, RowAverage(rows.num_rows)).merge(rows)
        if other._mass:
            self._mass = [a + b for a, b in zip(self._mass or [0.0] * len(other._mass), other._mass, strict=True)]
            union = self._union or [torch.zeros_like(used) for used in other._union]
            self._union = [a | b for a, b in zip(union, other._union, strict=True)]

    def result(self, previous: dict[str, Tensor]) -> dict[str, Tensor]:
        """The new tensors; where no update has weight, the value stays the same bit for bit."""
        new = {}
        for name, whole in self._whole.items():
            before, rows = previous[name], self._rows.get(name)
            if rows is None:
                new[name] = whole.result(before) * self._sum_of_alphas(name)
                continue
            by_row = rows.result(before[: rows.num_rows])
            rest = before[rows.num_rows :]
            new[name] = torch.cat([by_row, whole.result(rest)]) if rest.numel() else by_row
        return new

    def _sum_of_alphas(self, name: str) -> float:
        """1 if alphas are normalised or there was no client; as printed, sum_c sum_e p_c(e) / |S|, 0 if S is empty."""
        if not self._mass:
            return 1.0
        layer = layer_of(name)
        return self._mass[layer] / max(1, int(self._union[layer].sum()))


def _num_rows(tensor: Tensor, num_experts: int) -> int:
    """How many of the first rows of a router's tensor belong to one expert each.

    Decision: a matrix has one row per expert, and may have more rows for other things that the router scores
    (identities, shared experts). A vector has one entry per expert, or is something else, such as a scale of the input.
    What belongs to no expert is averaged by importance.
    """
    fits = tensor.dim() > 1 and len(tensor) >= num_experts
    return num_experts if fits or tensor.shape == (num_experts,) else 0
