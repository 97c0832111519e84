"""The MoE anatomy of a model: its layers, experts and sizes. Only the structure is needed; no weights are loaded."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from hfedmoe.config import ModelConfig, UpcycleConfig
from hfedmoe.errors import UserError
from hfedmoe.models.loading import structure
from hfedmoe.moe.anatomy import DenseModelError, MoELayer, UnsupportedModelError, find_moe_layers
from hfedmoe.moe.attention import is_attention
from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.prediction import promised
from hfedmoe.report.table import table
from hfedmoe.report.words import human_bytes, percent

LORA_RANK = 8
KINDS = ("embeddings, head", "attention", "routers", "experts", "shared experts", "other")
"""`other` is dense feed-forward blocks and norms."""


@dataclass(frozen=True)
class Layer:
    """One MoE layer; sizes are of one expert. LoRA: a float32 pair A, B on both projections of an expert."""

    name: str
    num_experts: int
    top_k: int
    router: str
    expert_parameters: int
    expert_bytes: int
    lora_bytes: int


@dataclass(frozen=True)
class Part:
    """All parameters of one kind."""

    parameters: int
    bytes: int


@dataclass(frozen=True)
class Anatomy:
    """The anatomy that `inspect` shows; `router_problem`: why the routers cannot be trained, None: they can."""

    model: str
    architecture: str
    dtype: str
    layers: list[Layer]
    parts: dict[str, Part]
    router_problem: str | None
    prediction_layers: int = 0
    """Layers for multi-token prediction in the config; they are neither loaded nor trained."""

    @property
    def num_experts(self) -> int:
        """Number of experts over all layers."""
        return sum(layer.num_experts for layer in self.layers)

    @property
    def total(self) -> Part:
        """The whole model."""
        parts = self.parts.values()
        return Part(sum(part.parameters for part in parts), sum(part.bytes for part in parts))


def anatomy_of(name: str, experts: int | None = None, top_k: int = 2) -> Anatomy:
    """The anatomy of a model by name, or with `experts` of its upcycled form.

    Raises:
        UserError: the model cannot be found, is dense but `experts` is None, or is not supported.
    """
    if experts is not None and top_k > experts:
        raise UserError(f"--upcycle-top-k {top_k} is more than --upcycle-experts {experts}")
    upcycle = None if experts is None else UpcycleConfig(experts=experts, top_k=top_k)
    try:
        return described(ModelConfig(name=name, upcycle=upcycle))
    except UnsupportedModelError as error:
        dense = isinstance(error, DenseModelError) and error.can_be_upcycled
        hint = "; --upcycle-experts 8 shows its upcycled form" if dense and experts is None else ""
        raise UserError(f"{name}: {error}{hint}") from None


def described(config: ModelConfig) -> Anatomy:
    """The anatomy of a configured model.

    Raises:
        UserError: the model cannot be found, or not be upcycled.
        UnsupportedModelError: it is dense, or its MoE layers are not supported.
    """
    model = structure(config)
    parts = _parts(model, find_moe_layers(model))  # before MoEModel turns routers into float32
    moe = MoEModel(model, experts="frozen")
    dtype = next(model.parameters()).dtype
    layers = [
        Layer(
            name=layer.name,
            num_experts=layer.num_experts,
            top_k=layer.top_k,
            router=type(layer.router).__name__,
            expert_parameters=layer.expert_numel,
            expert_bytes=layer.expert_numel * dtype.itemsize,
            lora_bytes=sum(
                LORA_RANK * sum(tensor.shape[1:]) * torch.float32.itemsize
                for tensor in state.tensors().values()
                if tensor.dim() == 3
            ),
        )
        for layer, state in zip(moe.layers, moe.states, strict=True)
    ]
    for layer in moe.layers:
        _fill_router(layer)
    return Anatomy(
        model=config.name if config.upcycle is None else f"{config.name}, upcycled",
        architecture=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        layers=layers,
        parts=parts,
        router_problem=moe.router_gradient_problem(),
        prediction_layers=promised(model.config),
    )


def to_json(anatomy: Anatomy) -> str:
    """The anatomy as JSON."""
    tree = asdict(anatomy) | {"num_experts": anatomy.num_experts, "total": asdict(anatomy.total)}
    return json.dumps(tree, indent=2)


def as_text(anatomy: Anatomy) -> str:
    """A page for people; equal layers in a row share one line."""
    lines = [
        f"{anatomy.model}: {anatomy.architecture}, {len(anatomy.layers)} MoE layers, {anatomy.num_experts} experts",
        "",
        *table(
            ["MoE layers", "experts", "top-k", "router", "one expert", f"LoRA r={LORA_RANK} on it"],
            [
                [
                    f"{first}-{last}" if last > first else f"{first}",
                    f"{layer.num_experts}",
                    f"{layer.top_k}",
                    layer.router,
                    human_bytes(layer.expert_bytes),
                    human_bytes(layer.lora_bytes),
                ]
                for first, last, layer in _runs(anatomy.layers)
            ],
        ),
        "",
        *table(
            ["kind", "parameters", f"bytes ({anatomy.dtype})", "share"],
            [
                [kind, f"{part.parameters:,}", human_bytes(part.bytes), percent(part.bytes / anatomy.total.bytes)]
                for kind, part in [*anatomy.parts.items(), ("total", anatomy.total)]
            ],
        ),
        "",
        f"routers: cannot be trained: {anatomy.router_problem}"
        if anatomy.router_problem
        else "routers: get a gradient, so they can be trained",
    ]
    if anatomy.prediction_layers:
        lines.append(
            f"multi-token prediction: {anatomy.prediction_layers} layer(s), which are not loaded, trained or exported"
        )
    return "\n".join(lines)


def _runs(layers: list[Layer]) -> Iterator[tuple[int, int, Layer]]:
    """(first, last, layer) of every sequence of layers that differ only in their names."""
    first = 0
    for index, layer in enumerate(layers):
        following = layers[index + 1] if index + 1 < len(layers) else None
        if following is None or replace(following, name=layer.name) != layer:
            yield first, index, layer
            first = index + 1


def _parts(model: Any, layers: list[MoELayer]) -> dict[str, Part]:
    """Parameters and bytes by kind; tied tensors are counted once."""
    owner: dict[int, str] = {}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            owner |= {id(parameter): "embeddings, head" for parameter in module.parameters()}
    for layer in layers:
        owner |= {id(parameter): "shared experts" for parameter in layer.block.parameters()}
        owner |= {id(parameter): "experts" for parameter in layer.experts.parameters()}
        owner |= {id(parameter): "routers" for parameter in layer.router.parameters()}
    numel, size = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for name, parameter in model.named_parameters():
        kind = owner.get(id(parameter), "attention" if is_attention(name) else "other")
        numel[kind] += parameter.numel()
        size[kind] += parameter.nbytes
    return {kind: Part(numel[kind], size[kind]) for kind in KINDS}


def _fill_router(layer: MoELayer) -> None:
    """Give a router random weights, to check if it gets a gradient: that does not depend on the weights."""
    generator = torch.Generator().manual_seed(1)  # not 0: the check draws its inputs with seed 0
    router: nn.Module = layer.router.to_empty(device="cpu").float()
    for tensor in [*router.parameters(), *router.buffers()]:
        tensor.data = torch.randn(tensor.shape, generator=generator) * 0.05
