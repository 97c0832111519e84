"""Fold the updates of a round into the global tensors, one client at a time (docs/method.md)."""

import torch
from torch import Tensor

from hfedmoe.config import MethodConfig
from hfedmoe.method.averaging import MeanAverage, StacksAverage
from hfedmoe.method.combining import StacksCombined
from hfedmoe.method.copies import Copies, over_layers
from hfedmoe.method.methods import METHODS
from hfedmoe.method.products import ProductAverage
from hfedmoe.method.ranks import PaddedAverage, Ranks
from hfedmoe.moe.payload import layer_of, lora_pairs, public
from hfedmoe.server.gate_fold import GateFold
from hfedmoe.wire.messages import Update


class Fold:
    """Streaming aggregation of one round: `add` every valid update, then call `result` once.

    Args:
        tensors: the global tensors, experts as [E, ...]; they are not changed.
        settings: the method and its constants.
        exact_lora: average the products B A instead of the factors (FlexLoRA), then factor the mean to the same rank.
        rank: the largest of the LoRA pairs, for `exact_lora` and for methods with pairs of several ranks.
        usage: of the federation in the rounds before, float32 [E] per layer, for methods that weigh by it.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        settings: MethodConfig,
        exact_lora: bool = False,
        rank: int = 0,
        usage: list[Tensor] | None = None,
    ) -> None:
        self._tensors, self._settings, self._method = tensors, settings, METHODS[settings.name]
        self._usage = usage
        tensors = public(tensors, self._method.private)
        ranks = self._method.ranks
        pairs = lora_pairs(tensors) if exact_lora or ranks is not None else []
        average = ProductAverage if exact_lora else PaddedAverage
        self._pairs = {pair: average(tensors[pair[0]].shape[0], rank) for pair in pairs if _of_experts(pair)}
        self._shared_pairs = {pair: average(1, rank) for pair in pairs if not _of_experts(pair)}
        self._pair_weight = Ranks.weight if ranks is None else ranks.weight
        in_pairs = {name for pair in pairs for name in pair}
        layers: dict[int, list[str]] = {}
        self._shared: dict[str, MeanAverage] = {}
        gates: list[str] = []
        for name in tensors:
            if name in in_pairs:
                continue
            if name.startswith("experts."):
                layers.setdefault(layer_of(name), []).append(name)
            elif name.startswith("router."):
                gates.append(name)
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
        combine = self._method.combine
        self._experts: StacksAverage | StacksCombined
        if combine is None:
            self._experts = StacksAverage(stretches)
        else:
            self._experts = StacksCombined(stretches, lambda changes, weights: combine(changes, weights, settings))
        self._gates = GateFold(gates, settings)
        self.clients = 0

    def add(self, update: Update, held: list[Tensor], examples: int) -> None:
        """Fold in one checked update with finite values. It keeps only the factors that `exact_lora` needs.

        Args:
            held: what the client held, bool [E] per layer.
            examples: |D_c|, limited by `federation.max_weight`.
        """
        self.clients += 1
        layers = [
            Copies(examples, *vectors, federation=None if self._usage is None else self._usage[layer])
            for layer, vectors in enumerate(
                zip(update.usage, update.importance, update.tokens, held, update.trained, strict=True)
            )
        ]
        weights = over_layers(lambda copies: self._method.expert_weight(copies, self._settings), layers)
        if self._stacks:
            sent = torch.cat([update.sent[layer] for layer in self._layers]).nonzero()[:, 0]
            weight = torch.cat([weights[layer] for layer in self._layers])[sent]
            self._experts.add({name: update.tensors[name] for name in self._stacks}, sent, weight, checked=True)
        for (a, b), average in self._pairs.items():
            layer, own_a, own_b = layer_of(a), update.tensors[a], update.tensors[b]
            index = update.sent[layer].nonzero()[:, 0]
            average.add(own_a, own_b, index, self._pair_weight(own_a, own_b, weights[layer][index]))
        for (a, b), average in self._shared_pairs.items():
            own_a, own_b = update.tensors[a][None], update.tensors[b][None]
            weight = self._pair_weight(own_a, own_b, torch.tensor([float(examples)]))
            average.add(own_a, own_b, torch.tensor([0]), weight)
        self._gates.add(update.tensors, layers)
        for name, mean in self._shared.items():
            mean.add(update.tensors[name], examples, checked=True)

    def result(self) -> dict[str, Tensor]:
        """The new global tensors; what no client trained keeps its value bit for bit."""
        new = dict(self._tensors)
        new |= self._experts.result({name: self._tensors[name] for name in self._stacks})
        for (a, b), average in self._pairs.items():
            new[a], new[b] = average.result(self._tensors[a], self._tensors[b])
        for (a, b), average in self._shared_pairs.items():
            (new[a],), (new[b],) = average.result(self._tensors[a][None], self._tensors[b][None])
        new |= self._gates.result(self._tensors)
        for name, mean in self._shared.items():
            new[name] = mean.result(self._tensors[name])
        return new


def _of_experts(pair: tuple[str, str]) -> bool:
    return pair[0].startswith("experts.")
