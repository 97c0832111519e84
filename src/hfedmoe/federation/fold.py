"""Fold the updates of a round into the global tensors, one client at a time (method.md section 4)."""

import torch
from torch import Tensor

from hfedmoe.config import MethodConfig
from hfedmoe.federation.messages import Update
from hfedmoe.method.aggregation import (
    MeanAverage,
    ProductAverage,
    RowAverage,
    StacksAverage,
    expert_weights,
    gate_alpha_numerator,
    gate_row_weights,
)

PAIRS = (("up_a", "up_b"), ("down_a", "down_b"))


class Fold:
    """Streaming aggregation of one round: `add` every valid update, then take the `result` (once).

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
        self._stacks: dict[int, StacksAverage] = {}
        self._names: dict[int, list[str]] = {}
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
                    self._stacks.setdefault(int(layer), StacksAverage(tensor.shape[0]))
                    self._names.setdefault(int(layer), []).append(name)
            elif name.startswith("router."):
                by_row = method.gate == "rows"
                self._gates[name] = RowAverage(tensor.shape[0]) if by_row else MeanAverage()
                self._gate_fallback[name] = MeanAverage()
            else:
                self._shared[name] = MeanAverage()
        self._judged: set[str] = set()
        self.clients = 0

    def add(self, update: Update) -> None:
        """Fold in one checked update (its values are finite) and keep nothing of it."""
        self.clients += 1
        trained = [flags.nonzero()[:, 0] for flags in update.trained]
        weights = [self._weights(update, layer)[index] for layer, index in enumerate(trained)]
        for layer, average in self._stacks.items():
            rows = {name: update.tensors[name] for name in self._names[layer]}
            average.add(rows, trained[layer], weights[layer], checked=True)
        for (a, b), products in self._products.items():
            layer = int(a.split(".")[1])
            products.add(update.tensors[a], update.tensors[b], trained[layer], weights[layer])
        for name in self._gates:
            self._add_gate(name, update)
        for name, mean in self._shared.items():
            mean.add(update.tensors[name], update.examples, checked=True)

    def _weights(self, update: Update, layer: int) -> Tensor:
        """What each expert of a layer counts, [E]."""
        return expert_weights(
            self._method.expert_weight,
            update.examples,
            update.usage[layer],
            update.importance[layer],
            update.tokens[layer],
            update.trained[layer],
            self._method.tau,
        )

    def _add_gate(self, name: str, update: Update) -> None:
        layer, gate = int(name.split(".")[1]), self._gates[name]
        usage, importance = update.usage[layer], update.importance[layer]
        tensor = update.tensors[name]
        if isinstance(gate, RowAverage):
            weights = gate_row_weights(usage, importance, update.trained[layer], self._method.tau)
            gate.add(tensor, torch.arange(tensor.shape[0]), weights, checked=True)
            return
        alpha = 0.0
        if self._method.gate == "importance":
            alpha = float(gate_alpha_numerator(usage, importance, self._method.tau))
        if alpha > 0:
            gate.add(tensor, alpha, checked=True)
            self._judged.add(name)
            self._gate_fallback.pop(name, None)
        elif name not in self._judged:
            self._gate_fallback[name].add(tensor, update.examples, checked=True)

    def result(self) -> dict[str, Tensor]:
        """The new global tensors; what nobody trained keeps its value bit for bit."""
        new = dict(self._tensors)
        for layer, average in self._stacks.items():
            new |= average.result({name: self._tensors[name] for name in self._names[layer]})
        for (a, b), products in self._products.items():
            new[a], new[b] = products.result(self._tensors[a], self._tensors[b])
        for name, gate in self._gates.items():
            previous = self._tensors[name]
            if name in self._gate_fallback and not isinstance(gate, RowAverage):
                # Decision: where every alpha is 0 the gates are averaged by |D_c| (also the rule "fedavg").
                new[name] = self._gate_fallback[name].result(previous)
            else:
                new[name] = gate.result(previous)
        for name, mean in self._shared.items():
            new[name] = mean.result(self._tensors[name])
        return new
