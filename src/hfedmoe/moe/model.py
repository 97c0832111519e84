"""A MoE model ready for federated fine-tuning: what is trained, what is resident, what is sent.

There are five kinds of trainable tensors; the names under which they are sent show the kind:

    router.{layer}.{name}    gates, whole
    experts.{layer}.{name}   trained tensors of the experts, one row per expert
    shared.{name}            everything else that is trained, whole
    scale.{layer}.output     a factor of the output of a layer's experts, for methods that train one
    own.{layer}.{name}       experts of a client's own and their gate (`experts.own`), for methods that have them
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hfedmoe.moe.anatomy import MoELayer, UnsupportedModelError, find_moe_layers
from hfedmoe.moe.attention import add_attention_lora
from hfedmoe.moe.experts.dispatch import keep_eager
from hfedmoe.moe.experts.merged import Mixture
from hfedmoe.moe.experts.own import OwnExperts, OwnKind
from hfedmoe.moe.experts.state import ExpertState, attach
from hfedmoe.moe.experts.store import ExpertStore
from hfedmoe.moe.experts.trained import TrainedExperts, full_experts, lora_experts
from hfedmoe.moe.head import keep_head_one_product
from hfedmoe.moe.routing.layer import LayerRouting
from hfedmoe.moe.routing.tokens import TokenMasks
from hfedmoe.moe.weights.residency import check_resident, mask, reside
from hfedmoe.moe.weights.standing_in import stand_in


class MoEModel:
    """Wraps a transformers model in place; everything outside `parameters()` is frozen.

    Args:
        model: any transformers model with MoE layers.
        experts: "lora", "full" or "frozen".
        rank, alpha: of the LoRA pairs; the low-rank term is scaled by alpha / rank.
        freeze_a: LoRA's A keeps its seeded random value and is not sent.
        router: train the routers.
        attention: LoRA (same rank and alpha) on the attention projections, through PEFT.
        seed: of the LoRA initialisation; must be the same on all devices.
        off_budget: what resident experts over the activation budget do: "frozen" (forward only) or "skip".
        store: holds the base tensors of the experts, which are then not parameters of `model`. It is empty until
            experts are made resident. Without a store all experts are in `model`, and residency is a mask over them.
        masked: hold every expert and mask them, even with a store.
        scales: train a scale of the output of each layer's experts, which begins at 1.
        own: train experts of a client's own beside those of each layer, with LoRA pairs of the same rank and alpha.

    Raises:
        UnsupportedModelError: no MoE layers, or layers that the expert forward does not support.
    """

    def __init__(
        self,
        model: Any,
        *,
        experts: str = "lora",
        rank: int = 8,
        alpha: float = 16.0,
        freeze_a: bool = False,
        router: bool = True,
        attention: bool = False,
        seed: int = 0,
        off_budget: str = "frozen",
        store: ExpertStore | None = None,
        masked: bool = False,
        scales: bool = False,
        own: OwnKind | None = None,
    ) -> None:
        self.model, self.store, self.masked = model, store, masked or store is None
        self._whole = experts == "full"
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.layers: list[MoELayer] = find_moe_layers(model)
        self.states: list[ExpertState] = attach(model, self.layers, store)
        self.routing = [LayerRouting(state) for state in self.states]
        for layer in self.layers:
            keep_eager(layer.block)
        keep_head_one_product(model)
        self.attention = add_attention_lora(model, rank, alpha, seed, freeze_a) if attention else {}
        """LoRA on the attention, A and B by the names under which they are sent; the trained ones are in `shared`."""
        self.shared = {name: tensor for name, tensor in self.attention.items() if tensor.requires_grad}
        for state in self.states:
            state.off_budget = off_budget
            self._train_experts(state, experts, rank, alpha, freeze_a, seed)
        if store is not None and masked:
            self._hold_all(store)
        self.scales: dict[str, Tensor] = {}
        if scales:
            for state in self.states:
                state.scale = torch.ones(1, device=self.device, requires_grad=True)
                self.scales[f"scale.{state.layer.index}.output"] = state.scale
        self.own: dict[str, Tensor] = {}
        """Of `OwnExperts.tensors`, by the names under which they would be sent."""
        for state in self.states if own is not None else ():
            assert own is not None
            number = state.layer.num_experts if own == "copy" else 1
            pairs = self._new_pairs(state, number, rank, alpha, freeze_a, seed)
            state.own = OwnExperts(own, pairs(), self.device)
            self.own |= {f"own.{state.layer.index}.{name}": t for name, t in state.own.tensors().items()}
        self.routers: dict[str, Tensor] = {}
        if router:
            for layer in self.layers:
                for name, parameter in layer.router_parameters().items():
                    parameter.data = parameter.data.float()  # in 16 bit, small updates would be rounded away
                    self.routers[f"router.{layer.index}.{name}"] = parameter.requires_grad_(True)

    def _train_experts(
        self, state: ExpertState, experts: str, rank: int, alpha: float, freeze_a: bool, seed: int
    ) -> None:
        tensors = state.tensors()
        if experts == "lora":
            begin = self._new_pairs(state, state.layer.num_experts, rank, alpha, freeze_a, seed)
            if self.masked:
                state.trained = begin()
            else:
                state.begin = lambda present: begin().select(present.to(self.device))
        elif experts == "full" and self.store is None:
            own = {name: tensor.contiguous() for name, tensor in tensors.items()}  # expanded stacks become real copies
            state.set_tensors(own)
            state.trained = full_experts(state.tensors() if state.layout.stacked else own)

    def _new_pairs(
        self, state: ExpertState, number: int, rank: int, alpha: float, freeze_a: bool, seed: int
    ) -> Callable[[], TrainedExperts]:
        """Makes new LoRA pairs for the experts of a layer: the same for the same seed."""
        tensors, own_seed = state.tensors(), seed * 100_003 + state.layer.index
        up, down = tensors["up"].shape[1:], tensors["down"].shape[1:]
        if state.math().transposed:
            up, down = up[::-1], down[::-1]
        return partial(
            lora_experts, number, (up[0], up[1]), (down[0], down[1]), rank, alpha, own_seed, self.device, freeze_a
        )

    @property
    def config(self) -> Any:
        """The config of the transformers model."""
        return self.model.config

    @property
    def num_experts(self) -> list[int]:
        """Experts per MoE layer."""
        return [layer.num_experts for layer in self.layers]

    @property
    def device(self) -> torch.device:
        """The device of its weights; the meta device for a model without contents."""
        devices = [parameter.device for parameter in self.model.parameters()]
        return next((device for device in devices if device.type != "meta"), devices[0])

    def parameters(self) -> list[Tensor]:
        """Everything that is trained: routers, shared tensors, and one leaf per expert and kind."""
        leaves = [leaf for state in self.states if state.trained is not None for leaf in state.trained.parameters()]
        leaves += [leaf for state in self.states if state.own is not None for leaf in state.own.parameters()]
        return [*self.routers.values(), *self.shared.values(), *self.scales.values(), *leaves]

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass instead of keeping them: less memory, more time."""
        self.model.activation_checkpointing_enable({"use_reentrant": False})

    def set_resident(self, resident: list[Tensor] | None, at_least: Sequence[int] | None = None) -> None:
        """Use only these experts (bool [E] per layer; None: all), by a mask or by reading and dropping them.

        Args:
            at_least: experts that every layer must keep; None: its top-k. Fewer are enough if others `stand_in`.

        Raises:
            ValueError: fewer in a layer.
            CheckpointError: an expert cannot be read.
        """
        for state in self.states:
            state.merged = None
        resident = self._everything() if resident is None and not self.masked else resident
        if resident is not None:
            check_resident(self.states, resident, at_least)
        if self.store is None or self.masked:
            mask(self.states, resident)
        else:
            assert resident is not None
            reside(self.states, self.store, resident, self._whole)

    def stand_in(self, mixtures: list[list[Mixture]], tensors: dict[str, Tensor]) -> None:
        """Let merged experts stand in for those that are not resident, until the residents change.

        Args:
            mixtures: per layer; none where absent experts are not to be chosen.
            tensors: the trained tensors of all experts, as they are sent; they are part of what is merged.

        Raises:
            CheckpointError: an expert cannot be read.
        """
        for state, own in zip(self.states, mixtures, strict=True):
            if own:
                prefix = f"experts.{state.layer.index}."
                rows = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
                stand_in(state, own, rows)

    @contextmanager
    def limited_top_k(self, number: int | None) -> Iterator[None]:
        """Let at most so many experts work on a token, those with the largest weights; None: the model's own top-k.

        Afterwards the model has no limit again, whatever happens inside.

        Raises:
            UnsupportedModelError: the model weighs the input of its experts and not their output.
        """
        if number is not None and any(state.layout.dispatch == "weights_on_input" for state in self.states):
            raise UnsupportedModelError("the number of experts per token cannot be limited in this family")
        try:
            for state in self.states:
                state.most_per_token = number
            yield
        finally:
            for state in self.states:
                state.most_per_token = None

    @contextmanager
    def streaming(self, capacity: int) -> Iterator[None]:
        """Every expert may be used in forward passes, with at most `capacity` of them in memory; base weights only.

        Raises:
            ValueError: the experts are in the model's own memory, or the capacity is below 1.
        """
        if self.store is None or self.masked:
            raise ValueError("all experts of this model are in memory: there is nothing to stream")
        before = [(state, state.resident, state.local, state.trained) for state in self.states]
        for state in self.states:
            state.resident = state.local = state.trained = None
        try:
            with torch.no_grad(), self.store.streaming(capacity):
                yield
        finally:
            for state, resident, local, trained in before:
                state.resident, state.local, state.trained = resident, local, trained

    def release(self) -> None:
        """Drop the experts in the store and their trained tensors; a masked model keeps them."""
        if self.store is not None and not self.masked:
            self.store.clear()
            for state in self.states:
                state.trained = state.merged = None

    def _hold_all(self, store: ExpertStore) -> None:
        if not self._whole:
            store.reside(self._everything())
            return
        for state, stacks in zip(self.states, store.reside_stacked(self._everything()), strict=True):
            state.trained = full_experts(stacks)

    def _everything(self) -> list[Tensor]:
        return [torch.ones(number, dtype=torch.bool) for number in self.num_experts]

    def watch(self, batch: TokenMasks | None, *measures: str | None) -> None:
        """Collect evidence from the next pass in every layer, and what `LayerRouting.watch` can measure; None stops."""
        for routing in self.routing:
            routing.watch(batch, *measures)

    def count(self, tokens: TokenMasks | None) -> None:
        """Let the experts skip padding in the next passes, without collecting evidence; None: all tokens count."""
        for state in self.states:
            state.counted = None if tokens is None else tokens.of(state.layer).keep.reshape(-1)

    def trained_now(self) -> list[list[bool]]:
        """Per layer and local expert: whether the last backward pass gave it a gradient."""
        return [[] if state.trained is None else state.trained.has_gradient() for state in self.states]

    def router_gradient_problem(self) -> str | None:
        """Why the routers cannot learn (renormalised top-1 weights are always 1); None if they can."""
        for layer in self.layers:
            weight = next(p for p in layer.router.parameters() if p.dim() == 2)
            if weight.is_meta or not self.routers:
                return None
            if not _router_learns(layer, weight):
                return (
                    f"layer {layer.name} routes each token to {layer.top_k} expert(s) with weights that do not depend "
                    "on the router (top-1 weights renormalised to 1), so the router gets no gradient; "
                    "use top_k >= 2, a family that does not renormalise, or train.router = false"
                )
        return None


def _router_learns(layer: MoELayer, weight: Tensor) -> bool:
    """Whether the gate weights have a gradient, tested by running the router alone on random states."""
    if layer.fixed_routing:  # it needs token ids, and its weights are those of all experts
        return layer.top_k > 1
    generator = torch.Generator().manual_seed(982_451_653)  # not a seed that weights are drawn with
    states = torch.randn(1, 64, weight.shape[1], generator=generator).to(weight)
    # In some families the block owns the correction bias and passes it to the router.
    biases = [getattr(owner, name) for owner, name in layer.correction_biases() if owner is layer.block]
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some routers sample
        outputs = layer.router(states, *biases)
        if isinstance(outputs, Tensor):  # logits only: the block makes the weights
            return layer.top_k > 1 or not getattr(layer.block, "norm_topk_prob", False)
        floats = [out for out in outputs if out.is_floating_point() and out.requires_grad]
        # Weights of the chosen experts, or else scores of all experts, which come before the logits.
        scores = [out for out in floats if out.shape[-1] == layer.top_k] or floats[:1]
        if not scores:
            return False
        mix = torch.rand(scores[0].shape, generator=generator).to(scores[0])
        (gradient,) = torch.autograd.grad((scores[0] * mix).sum(), weight)
    # Renormalised top-1 weights are w / w: only rounding is left, about 1e-7; real gradients are 0.1 to 1.
    return bool(gradient.abs().max() > 1e-5)
