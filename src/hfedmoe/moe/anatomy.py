"""Find the Mixture-of-Experts layers of any transformers model by their structure.

A MoE layer is a module (the *block*) with two parts: *experts*, either one module of stacked weights `[E, ., .]`
(the layout of most families in transformers) or a container of E feed-forward modules of equal shape (Switch
Transformers), and a *router* that scores `E` experts for each token. Neither is looked up by class name.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hfedmoe.moe.families import DENSE, UNSUPPORTED, why_dense

STACKED_DOWN = "down_proj"
STACKED_UP = ("gate_up_proj", "up_proj")
CORRECTION_BIASES = ("correction_bias", "expert_bias")
"""Parts of the names of tensors that change the choice of experts but not the logits (as in DeepSeek-V3)."""


class UnsupportedModelError(ValueError):
    """The MoE layers of the model are not supported; the message names the model's type and what is missing."""


class DenseModelError(UnsupportedModelError):
    """The model has no MoE layers; `can_be_upcycled` says whether `model.upcycle` supports its family."""

    def __init__(self, message: str, can_be_upcycled: bool) -> None:
        super().__init__(message)
        self.can_be_upcycled = can_be_upcycled


@dataclass
class MoELayer:
    """One MoE layer: its place in the model and its parts."""

    index: int
    name: str
    block: nn.Module
    router: nn.Module
    experts: Any
    """A module whose attributes differ by family: stacked weights, or a container of feed-forward modules."""
    num_experts: int
    top_k: int
    in_decoder: bool
    """Tokens come from the decoder of an encoder-decoder model (True also for decoder-only models)."""

    @property
    def expert_numel(self) -> int:
        """Number of weights of one expert."""
        return sum(parameter.numel() for parameter in self.experts.parameters()) // self.num_experts

    @property
    def num_logits(self) -> int:
        """Number of router logits: one per expert, plus those for shared or identity experts, if any."""
        weight = _scoring_weight(self.router, self.num_experts)
        assert weight is not None
        return weight.shape[0]

    @property
    def directions(self) -> Tensor:
        """[E, H]: the router's row of every expert."""
        weight = _scoring_weight(self.router, self.num_experts)
        assert weight is not None
        return weight.detach()[: self.num_experts]

    @property
    def fixed_routing(self) -> bool:
        """Whether a table gives the experts of each token, so that only their weights are learned (DeepSeek-V4)."""
        return any(
            not table.is_floating_point() and table.dim() == 2 and table.shape[1] == self.top_k
            for table in self.router.buffers()
        )

    def correction_biases(self) -> list[tuple[nn.Module, str]]:
        """(module, attribute) of each tensor that changes the choice of experts but not the logits."""
        return [
            (owner, name)
            for owner in self.block.modules()
            for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]
            if any(part in name for part in CORRECTION_BIASES) and tensor.numel() in (self.num_experts, self.num_logits)
        ]

    def router_parameters(self) -> dict[str, nn.Parameter]:
        """The router's parameters that are trained by gradients: all except correction biases."""
        fixed = {id(getattr(owner, name)) for owner, name in self.correction_biases()}
        return {name: tensor for name, tensor in self.router.named_parameters() if id(tensor) not in fixed}


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of `model`, in the order in which they appear.

    Raises:
        DenseModelError: there is none.
        UnsupportedModelError: the family is refused by name, or a layer's router cannot be found or read.
    """
    layers: list[MoELayer] = []
    config = getattr(model, "config", None)
    family, lonely = model_type(model), ""
    if family in UNSUPPORTED:
        raise UnsupportedModelError(f"{family}: {UNSUPPORTED[family]}")
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    for name, block in model.named_modules():
        experts = _experts_of(block)
        if experts is None:
            continue
        num_experts = _count(experts)
        router = _router_of(block, experts, num_experts)
        if router is None:
            lonely = f"{family}: layer {name} has {num_experts} experts but no router that scores them"
            if is_stacked(experts):
                raise UnsupportedModelError(lonely)
            continue  # equal feed-forward networks in a list are not always experts
        layers.append(
            MoELayer(
                index=len(layers),
                name=name,
                block=block,
                router=router,
                experts=experts,
                num_experts=num_experts,
                top_k=_top_k(block, router, config, f"{family}: layer {name}"),
                in_decoder=not encoder_decoder or "decoder" in name.split("."),
            )
        )
    if not layers and lonely:
        raise UnsupportedModelError(lonely)
    if not layers:
        raise DenseModelError(why_dense(family), family in DENSE)
    return layers


def model_type(model: nn.Module) -> str:
    """The model's family as transformers names it; the class name if the model has no configuration."""
    return getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__


def text_config(config: Any) -> Any:
    """The part of a transformers config that describes the language model."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def is_stacked(experts: nn.Module) -> bool:
    """Whether the experts are one module of weights stacked along the first dimension."""
    down = getattr(experts, STACKED_DOWN, None)
    return isinstance(down, Tensor) and down.dim() == 3


def _experts_of(block: nn.Module) -> nn.Module | None:
    for child in block.children():
        if is_stacked(child) and any(isinstance(getattr(child, name, None), Tensor) for name in STACKED_UP):
            return child
        if isinstance(child, nn.ModuleDict | nn.ModuleList) and len(child) > 1 and _alike_feed_forwards(child):
            return child
    return None


def _alike_feed_forwards(container: nn.ModuleDict | nn.ModuleList) -> bool:
    """Whether all members are feed-forward networks of two or three matrices, with equal shapes."""
    members = list(container.values()) if isinstance(container, nn.ModuleDict) else list(container)
    shapes = [[tuple(p.shape) for p in member.parameters()] for member in members]
    matrices = [shape for shape in shapes[0] if len(shape) == 2]
    if any(shape != shapes[0] for shape in shapes) or len(matrices) not in (2, 3):
        return False
    # Decoder layers have equal shapes too, but only in a feed-forward network all matrices have the same two sizes.
    return len({frozenset(shape) for shape in matrices}) == 1 and not any(
        isinstance(inner, nn.ModuleList) for member in members for inner in member.modules()
    )


def _count(experts: Any) -> int:
    if is_stacked(experts):
        return int(experts.down_proj.shape[0])
    return len(experts)


def _router_of(block: nn.Module, experts: nn.Module, num_experts: int) -> nn.Module | None:
    for child in block.children():
        if child is not experts and _scoring_weight(child, num_experts) is not None:
            return child
    return None


def _scoring_weight(module: nn.Module, num_experts: int) -> Tensor | None:
    """The router matrix [num_experts, H]; it may have up to twice the rows if `module.num_experts` is num_experts."""
    most = 2 * num_experts if getattr(module, "num_experts", None) == num_experts else num_experts
    for parameter in module.parameters():
        if parameter.dim() == 2 and num_experts <= parameter.shape[0] <= most and _is_small(module, parameter):
            return parameter
    return None


def _is_small(module: nn.Module, weight: Tensor) -> bool:
    """Whether `weight` is nearly all of the module: true for a router, false for a shared expert of that shape."""
    return sum(parameter.numel() for parameter in module.parameters()) <= weight.numel() + 2 * sum(weight.shape)


def _top_k(block: nn.Module, router: nn.Module, config: Any, where: str) -> int:
    for owner in (router, block):
        value = getattr(owner, "top_k", None)
        if isinstance(value, int):
            return value
    text = text_config(config)
    for key in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts"):
        value = getattr(text, key, None)
        if isinstance(value, int):
            return value
    if hasattr(router, "expert_capacity"):  # Switch routing: one expert per token, up to a capacity
        return 1
    raise UnsupportedModelError(f"{where}: cannot tell how many experts a token uses (no top_k)")
