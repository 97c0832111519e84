"""Bytes of a model's weights and of its trained and sent tensors, counted from its structure without weights."""

import copy
import functools
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

import torch

from hfedmoe.device.workload import Workload
from hfedmoe.moe.attention import is_attention
from hfedmoe.moe.compact import compute_in_float32
from hfedmoe.moe.experts.quantised import stored_bytes
from hfedmoe.moe.model import MoEModel

BASE = ("embeddings_head", "attention", "other_base", "routers")


@dataclass(frozen=True)
class LayerWeights:
    """The experts of one MoE layer; shapes are of one expert."""

    num_experts: int
    top_k: int
    base: dict[str, tuple[int, ...]]
    """Shapes of the base tensors, under the names of kernel.FULL."""

    def trained(self, workload: Workload) -> dict[str, tuple[int, ...]]:
        """Shapes of the trained tensors of one expert, without fixed matrices."""
        if workload.experts == "full":
            return self.base
        if workload.experts == "frozen":
            return {}
        return {name: shape for name, shape in self._lora(workload).items() if not _fixed(name, workload)}

    def _lora(self, workload: Workload) -> dict[str, tuple[int, ...]]:
        rank, (up, down) = workload.rank, (self.base["up"], self.base["down"])
        # Families store matrices [out, in] or [in, out]: there is one factor per side in both cases.
        return {"up_a": (rank, up[1]), "up_b": (up[0], rank), "down_a": (rank, down[1]), "down_b": (down[0], rank)}

    def adapter_bytes(self, workload: Workload) -> int:
        """Bytes of the LoRA pairs of one expert, with fixed matrices; they are float32."""
        return _numel(self._lora(workload)) * 4 if workload.experts == "lora" else 0

    def trained_bytes(self, workload: Workload) -> int:
        """Bytes of the trained tensors of one expert."""
        size = workload.torch_dtype.itemsize if workload.experts == "full" else 4
        return _numel(self.trained(workload)) * size

    def base_bytes(self, workload: Workload) -> int:
        """Bytes of the base tensors of one expert, as they are held."""
        dtype = workload.torch_dtype
        return sum(stored_bytes(shape, workload.expert_dtype, dtype) for shape in self.base.values())

    @property
    def largest(self) -> int:
        """Number of values of the largest tensor of one expert."""
        return max(math.prod(shape) for shape in self.base.values())


@dataclass(frozen=True)
class Tensors:
    """Shapes and precisions of named tensors."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(math.prod(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items())


class ModelBytes:
    """The weights of a model.

    Args:
        structure: the model on the meta device; it is not changed.
    """

    def __init__(self, structure: Any) -> None:
        self.structure = structure
        self._main = next(p.dtype for p in structure.parameters() if p.dim() > 1)
        moe = MoEModel(copy.deepcopy(structure), experts="frozen", router=False)
        self.layers = [
            LayerWeights(
                state.layer.num_experts,
                state.layer.top_k,
                {name: tuple(stack.shape[1:]) for name, stack in state.tensors().items()},
            )
            for state in moe.states
        ]
        self._prepared: dict[Workload, _Prepared] = {}

    @functools.cached_property
    def fingerprint(self) -> str:
        """The same for models of the same code, configuration and tensors."""
        kind, config = type(self.structure), self.structure.config
        told = [f"{kind.__module__}.{kind.__qualname__}", str(config._attn_implementation), config.to_json_string()]
        told += [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in self.structure.state_dict().items()]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()

    def model(self, workload: Workload) -> Any:
        """A copy of the structure in the precisions of the workload."""
        model = copy.deepcopy(self.structure)
        for parameter in model.parameters():
            if parameter.dtype == self._main:
                parameter.data = parameter.data.to(workload.torch_dtype)
        if workload.compute_float32:
            compute_in_float32(model)
        return model

    def _prepare(self, workload: Workload) -> "_Prepared":
        key = Workload(
            dtype=workload.dtype,
            compute_float32=workload.compute_float32,
            router=workload.router,
            attention=workload.attention,
            rank=workload.rank if workload.attention else 1,
            freeze_a=workload.freeze_a and workload.attention,
        )
        if key not in self._prepared:
            moe = MoEModel(
                self.model(key),
                experts="frozen",
                rank=key.rank,
                freeze_a=key.freeze_a,
                router=key.router,
                attention=key.attention,
            )
            whole = moe.routers | moe.shared
            self._prepared[key] = _Prepared(
                _kinds(moe),
                Tensors({n: tuple(t.shape) for n, t in whole.items()}, {n: t.dtype for n, t in whole.items()}),
                sum(tensor.nbytes for tensor in moe.attention.values()),
            )
        return self._prepared[key]

    def base(self, workload: Workload) -> dict[str, int]:
        """Bytes by kind (`BASE`) of all weights except the experts'; tied tensors count once."""
        sizes = dict.fromkeys(BASE, 0)
        for kind, tensor in self._prepare(workload).base:
            sizes[kind] += tensor.nbytes
        return sizes

    def largest_bytes(self, workload: Workload) -> tuple[int, int]:
        """Bytes of the largest tensor in the checkpoint's precision: outside the experts, and of an expert."""
        base = max(tensor.numel() for _, tensor in self._prepare(workload).base)
        return base * self._main.itemsize, max(layer.largest for layer in self.layers) * self._main.itemsize

    def whole(self, workload: Workload) -> Tensors:
        """The tensors that are trained and sent whole: routers, and LoRA on the attention."""
        return self._prepare(workload).whole

    def shared_bytes(self, workload: Workload) -> int:
        """Bytes of LoRA on the attention."""
        return self._prepare(workload).shared_bytes

    def travelling(self, residents: list[int], workload: Workload) -> Tensors:
        """The tensors sent to a client with `residents` experts per layer, and sent back if it trains them all."""
        whole = self.whole(workload)
        shapes, dtypes = dict(whole.shapes), dict(whole.dtypes)
        dtype = workload.torch_dtype if workload.experts == "full" else torch.float32
        for index, (layer, number) in enumerate(zip(self.layers, residents, strict=True)):
            for name, shape in layer.trained(workload).items():
                shapes[f"experts.{index}.{name}"], dtypes[f"experts.{index}.{name}"] = (number, *shape), dtype
        return Tensors(shapes, dtypes)


@dataclass(frozen=True)
class _Prepared:
    base: list[tuple[str, torch.Tensor]]
    """(kind, tensor on the meta device), as from `_kinds`."""
    whole: Tensors
    shared_bytes: int


_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def blob_bytes(tensors: Tensors) -> int:
    """Size of a safetensors file with these tensors."""
    header, offset = {}, 0
    # The format sorts by precision, widest first, and then by name: the number of digits of the offsets depends on it.
    for name in sorted(tensors.shapes, key=lambda name: (-tensors.dtypes[name].itemsize, name)):
        shape, dtype = tensors.shapes[name], tensors.dtypes[name]
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + math.ceil(length / 8) * 8 + offset


def _kinds(moe: MoEModel) -> list[tuple[str, torch.Tensor]]:
    """(kind, tensor) of all tensors of the model, except those of experts and LoRA."""
    model = moe.model
    owner = dict.fromkeys(map(id, moe.attention.values()), "adapters")
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            owner |= {id(parameter): "embeddings_head" for parameter in module.parameters()}
    for layer in moe.layers:
        owner |= {id(parameter): "other_base" for parameter in layer.block.parameters()}  # shared experts
        owner |= {id(parameter): "experts" for parameter in layer.experts.parameters()}
        owner |= {id(parameter): "routers" for parameter in layer.router.parameters()}
    found = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        kind = owner.get(id(tensor), "attention" if is_attention(name) else "other_base")
        if kind in BASE:
            found.append((kind, tensor))
    return found


def _fixed(name: str, workload: Workload) -> bool:
    return workload.freeze_a and name.endswith("_a")


def _numel(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes.values()))
