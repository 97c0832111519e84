"""Fold the updates of a round into the global tensors, one client at a time (docs/method.md)."""

import torch
from torch import Tensor

from hfedmoe.config import MethodConfig
from hfedmoe.method.averaging import MeanAverage, StacksAverage
from hfedmoe.method.combining import StacksCombined
from hfedmoe.method.copies import Copies, over_layers
from hfedmoe.method.methods import METHODS
from hfedmoe.method.products import ProductAverage, product_norms
from hfedmoe.moe.payload import layer_of, lora_pairs, public
from hfedmoe.moe.ranks import expert_pairs, padded
from hfedmoe.server.components import Arrived
from hfedmoe.server.gate_fold import GateFold
from hfedmoe.server.kept import KeptRows
from hfedmoe.wire.messages import Update


class Fold:
    """Streaming aggregation of one round: `add` every valid update, then call `result` once.

    Args:
        tensors: the global tensors, experts as [E, ...]; they are not changed.
        settings: the method and its constants.
        exact_lora: average the products B A instead of the factors (FlexLoRA), then factor the mean to the same rank.
        rank: of the LoRA pairs, for `exact_lora` and for methods whose clients have different ranks.
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
        self._usage, self._rank = usage, rank
        tensors = public(tensors, self._method.private)
        pairs = lora_pairs(tensors) if exact_lora else []
        self._products = {pair: self._average(tensors[pair[0]].shape[0]) for pair in pairs if _of_experts(pair)}
        self._shared_products = {pair: ProductAverage(1, rank) for pair in pairs if not _of_experts(pair)}
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
        self._kept = KeptRows(stretches)
        self._gates = GateFold(gates, settings)
        self._arrived = Arrived() if self._method.rank is not None and not exact_lora else None
        self.clients = 0

    def _average(self, experts: int) -> ProductAverage:
        return ProductAverage(experts, self._rank, ordered=self._method.rank is not None)

    def add(self, update: Update, held: list[Tensor], examples: int) -> None:
        """Fold in one checked update with finite values. It keeps only the factors that `exact_lora` needs.

        Args:
            held: what the client held, bool [E] per layer.
            examples: |D_c|, limited by `federation.max_weight`.
        """
        self.clients += 1
        sizes = _sizes(update) if self._method.needs_size else None
        layers = [
            Copies(
                examples,
                *vectors,
                federation=None if self._usage is None else self._usage[layer],
                size=None if sizes is None else sizes[layer],
            )
            for layer, vectors in enumerate(
                zip(update.usage, update.importance, update.tokens, held, update.trained, strict=True)
            )
        ]
        weights = over_layers(lambda copies: self._method.expert_weight(copies, self._settings), layers)
        tensors = update.tensors
        if self._method.rank is not None:
            if self._arrived is not None:
                self._arrived.add(tensors, update.sent, weights)
            ranks = {tensors[a].shape[1] for a, _ in expert_pairs(tensors)}
            tensors = padded(tensors, min(ranks, default=None), self._rank)
        if self._stacks:
            sent = torch.cat([update.sent[layer] for layer in self._layers]).nonzero()[:, 0]
            weight = torch.cat([weights[layer] for layer in self._layers])
            self._experts.add({name: tensors[name] for name in self._stacks}, sent, weight[sent], checked=True)
            if self._method.kept_weight(layers[0], self._settings) is not None:
                kept = over_layers(self._kept_weights, layers)
                self._kept.add(weight, torch.cat([kept[layer] for layer in self._layers]))
        for (a, b), products in self._products.items():
            layer = layer_of(a)
            index = update.sent[layer].nonzero()[:, 0]
            products.add(tensors[a], tensors[b], index, weights[layer][index])
        for (a, b), products in self._shared_products.items():
            weight = torch.tensor([float(examples)])
            products.add(tensors[a][None], tensors[b][None], torch.tensor([0]), weight)
        self._gates.add(tensors, layers)
        for name, mean in self._shared.items():
            mean.add(tensors[name], examples, checked=True)

    def _kept_weights(self, copies: Copies) -> Tensor:
        weights = self._method.kept_weight(copies, self._settings)
        assert weights is not None
        return weights

    def merge(self, other: "Fold") -> None:
        """Add all clients of another fold of the same round: a tree of folds is one fold, up to rounding.

        A region's aggregator folds its own clients and sends on the result, which has the size of one update. Methods
        that compare all copies of an expert with each other (`Method.combine`) keep every update until the end, here
        too. The other fold must not be used any more.

        Args:
            other: of the same global tensors and settings.
        """
        self.clients += other.clients
        assert type(self._experts) is type(other._experts)
        self._experts.merge(other._experts)  # type: ignore[arg-type]
        self._kept.merge(other._kept)
        self._gates.merge(other._gates)
        if self._arrived is not None and other._arrived is not None:
            self._arrived.merge(other._arrived)
        for pair, products in (*self._products.items(), *self._shared_products.items()):
            products.merge(other._products[pair] if pair in other._products else other._shared_products[pair])
        for name, mean in self._shared.items():
            mean.merge(other._shared[name])

    def result(self) -> dict[str, Tensor]:
        """The new global tensors; what no client trained keeps its value bit for bit."""
        new = dict(self._tensors)
        stacks = {name: self._tensors[name] for name in self._stacks}
        new |= self._kept.mixed(stacks, self._experts.result(stacks))
        if self._arrived is not None:
            self._arrived.keep_the_others(new, self._tensors)
        for (a, b), products in self._products.items():
            new[a], new[b] = products.result(self._tensors[a], self._tensors[b])
        for (a, b), products in self._shared_products.items():
            (new[a],), (new[b],) = products.result(self._tensors[a][None], self._tensors[b][None])
        new |= self._gates.result(self._tensors)
        for name, mean in self._shared.items():
            new[name] = mean.result(self._tensors[name])
        return self._stepped(new)

    def _stepped(self, new: dict[str, Tensor]) -> dict[str, Tensor]:
        """The method's step. Factors of averaged products are as they are: those of two rounds have other axes."""
        step = self._method.server_step(self._settings)
        if step == 1.0:
            return new
        factors = {name for pair in [*self._products, *self._shared_products] for name in pair}
        return {
            name: tensor if name in factors else torch.lerp(self._tensors[name], tensor, step)
            for name, tensor in new.items()
        }


def _sizes(update: Update) -> list[Tensor]:
    """The norm of each expert's LoRA products in an update, float32 [E] per layer (`Copies.size`)."""
    squares = [torch.zeros(len(sent)) for sent in update.sent]
    for a, b in expert_pairs(update.tensors):
        layer = layer_of(a)
        squares[layer][update.sent[layer]] += product_norms(update.tensors[a], update.tensors[b]).cpu() ** 2
    return [total.sqrt() for total in squares]


def _of_experts(pair: tuple[str, str]) -> bool:
    return pair[0].startswith("experts.")
