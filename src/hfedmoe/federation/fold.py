"""Fold the updates of a round into the global tensors, one client at a time (method.md section 4)."""

from collections.abc import Callable
from functools import partial

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
        layers: dict[int, list[str]] = {}
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
                    layers.setdefault(int(layer), []).append(name)
            elif name.startswith("router."):
                by_row = method.gate == "rows"
                self._gates[name] = RowAverage(tensor.shape[0]) if by_row else MeanAverage()
                self._gate_fallback[name] = MeanAverage()
            else:
                self._shared[name] = MeanAverage()
        self._layers = sorted(layers)
        stretches: dict[str, tuple[int, int]] = {}
        first = 0
        for own in (layers[index] for index in self._layers):  # experts are numbered over all layers
            number = tensors[own[0]].shape[0]
            stretches |= dict.fromkeys(own, (first, number))
            first += number
        self._stacks = list(stretches)
        self._experts = StacksAverage(stretches)
        self._judged: set[str] = set()
        self.clients = 0

    def add(self, update: Update) -> None:
        """Fold in one checked update (its values are finite) and keep nothing of it."""
        self.clients += 1
        weigh = partial(expert_weights, self._method.expert_weight, update.examples, tau=self._method.tau)
        weights = over_layers(weigh, update.usage, update.importance, update.tokens, update.trained)
        if self._stacks:
            trained = torch.cat([update.trained[layer] for layer in self._layers]).nonzero()[:, 0]
            weight = torch.cat([weights[layer] for layer in self._layers])[trained]
            self._experts.add({name: update.tensors[name] for name in self._stacks}, trained, weight, checked=True)
        for (a, b), products in self._products.items():
            layer = int(a.split(".")[1])
            index = update.trained[layer].nonzero()[:, 0]
            products.add(update.tensors[a], update.tensors[b], index, weights[layer][index])
        if self._method.gate == "rows":
            self._add_gate_rows(update)
        else:
            self._add_gates(update)
        for name, mean in self._shared.items():
            mean.add(update.tensors[name], update.examples, checked=True)

    def _add_gate_rows(self, update: Update) -> None:
        weigh = partial(gate_row_weights, tau=self._method.tau)
        weights = over_layers(weigh, update.usage, update.importance, update.trained)
        for name, gate in self._gates.items():
            tensor = update.tensors[name]
            assert isinstance(gate, RowAverage)
            gate.add(tensor, torch.arange(tensor.shape[0]), weights[_layer_of(name)], checked=True)

    def _add_gates(self, update: Update) -> None:
        alphas = [0.0] * len(update.usage)
        if self._method.gate == "importance":
            weigh = partial(gate_alpha_numerator, tau=self._method.tau)
            alphas = torch.stack(over_layers(weigh, update.usage, update.importance)).tolist()
        for name, gate in self._gates.items():
            assert isinstance(gate, MeanAverage)
            alpha = alphas[_layer_of(name)]
            if alpha > 0:
                gate.add(update.tensors[name], alpha, checked=True)
                self._judged.add(name)
                self._gate_fallback.pop(name, None)
            elif name not in self._judged:
                self._gate_fallback[name].add(update.tensors[name], update.examples, checked=True)

    def result(self) -> dict[str, Tensor]:
        """The new global tensors; what nobody trained keeps its value bit for bit."""
        new = dict(self._tensors)
        new |= self._experts.result({name: self._tensors[name] for name in self._stacks})
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


def over_layers(rule: Callable[..., Tensor], *vectors: list[Tensor]) -> list[Tensor]:
    """What `rule` makes of the vectors [E] of each layer, for all layers at once where they have as many experts.

    Args:
        rule: takes one [..., E] for each of `vectors`.
        vectors: a list over the layers each.
    """
    if len({len(vector) for vector in vectors[0]}) == 1:
        return list(rule(*map(torch.stack, vectors)).unbind(0))
    return [rule(*layer) for layer in zip(*vectors, strict=True)]


def _layer_of(name: str) -> int:
    return int(name.split(".")[1])
