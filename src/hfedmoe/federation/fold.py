"""Fold the updates of a round into the global tensors, one client at a time (method.md section 4)."""

import torch
from torch import Tensor

from hfedmoe.config import MethodConfig
from hfedmoe.federation.messages import Update
from hfedmoe.method.aggregation import (
    MeanAverage,
    ProductAverage,
    RowAverage,
    expert_weights,
    gate_alpha_numerator,
    gate_row_weights,
)

PAIRS = (("up_a", "up_b"), ("down_a", "down_b"))


class Fold:
    """Streaming aggregation of one round: `add` every valid update, then take the `result`.

    Args:
        tensors: the global tensors, experts as [E, ...]; they are not changed.
        method: expert weights, gate rule, tau.
        exact_lora: average the products B A instead of the factors (FlexLoRA), refactored to the same rank.
        rank: of the LoRA pairs, for `exact_lora`.
    """

    def __init__(
        self, tensors: dict[str, Tensor], method: MethodConfig, exact_lora: bool = False, rank: int = 0
    ) -> None:
        self._tensors, self._method = tensors, method
        self._rows: dict[str, RowAverage] = {}
        self._products: dict[tuple[str, str], ProductAverage] = {}
        self._gates: dict[str, MeanAverage | RowAverage] = {}
        self._gate_fallback: dict[str, MeanAverage] = {}
        self._shared: dict[str, MeanAverage] = {}
        for name, tensor in tensors.items():
            if name.startswith("experts."):
                layer, kind = name.split(".", 2)[1:]
                pair = next((pair for pair in PAIRS if kind in pair), None)
                if exact_lora and pair is not None:
                    names = (f"experts.{layer}.{pair[0]}", f"experts.{layer}.{pair[1]}")
                    if names[0] in tensors and names not in self._products:
                        self._products[names] = ProductAverage(tensor.shape[0], rank)
                else:
                    self._rows[name] = RowAverage(tensor.shape[0])
            elif name.startswith("router."):
                by_row = method.gate == "rows"
                self._gates[name] = RowAverage(tensor.shape[0]) if by_row else MeanAverage()
                self._gate_fallback[name] = MeanAverage()
            else:
                self._shared[name] = MeanAverage()
        self.clients = 0

    def add(self, update: Update) -> None:
        """Fold in one checked update and keep nothing of it."""
        self.clients += 1
        weights = [
            expert_weights(
                self._method.expert_weight, update.examples, usage, importance, tokens, trained, self._method.tau
            )
            for usage, importance, tokens, trained in zip(
                update.usage, update.importance, update.tokens, update.trained, strict=True
            )
        ]
        for name, average in self._rows.items():
            index, weight = self._chosen(name, update, weights)
            average.add(update.tensors[name], index, weight)
        for (a, b), products in self._products.items():
            index, weight = self._chosen(a, update, weights)
            products.add(update.tensors[a], update.tensors[b], index, weight)
        for name in self._gates:
            self._add_gate(name, update)
        for name, mean in self._shared.items():
            mean.add(update.tensors[name], update.examples)

    def _chosen(self, name: str, update: Update, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Which experts the rows of `name` belong to, and what each of them counts."""
        layer = int(name.split(".")[1])
        index = update.trained[layer].nonzero()[:, 0]
        return index, weights[layer][index]

    def _add_gate(self, name: str, update: Update) -> None:
        layer, gate = int(name.split(".")[1]), self._gates[name]
        usage, importance = update.usage[layer], update.importance[layer]
        tensor = update.tensors[name]
        if isinstance(gate, RowAverage):
            rows = torch.arange(tensor.shape[0])
            gate.add(tensor, rows, gate_row_weights(usage, importance, update.trained[layer], self._method.tau))
            return
        self._gate_fallback[name].add(tensor, update.examples)
        if self._method.gate == "importance":
            alpha = gate_alpha_numerator(usage, importance, self._method.tau)
            if alpha > 0:
                gate.add(tensor, alpha)

    def result(self) -> dict[str, Tensor]:
        """The new global tensors; what nobody trained keeps its value bit for bit."""
        new = dict(self._tensors)
        for name, average in self._rows.items():
            new[name] = average.result(self._tensors[name])
        for (a, b), products in self._products.items():
            new[a], new[b] = products.result(self._tensors[a], self._tensors[b])
        for name, gate in self._gates.items():
            if isinstance(gate, RowAverage):
                new[name] = gate.result(self._tensors[name])
            else:
                # Decision: where every alpha is 0 the gates are averaged by |D_c| (also the rule "fedavg").
                new[name] = gate.result(self._gate_fallback[name].result(self._tensors[name]))
        for name, mean in self._shared.items():
            new[name] = mean.result(self._tensors[name])
        return new
