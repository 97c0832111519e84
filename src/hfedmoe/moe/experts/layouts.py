"""How families store their experts: as stacks `[E, ...]` in one module, or as a container with one module per expert.

A layout reads and replaces the tensors of a layer's experts, knows their names in the model, and says how the experts
compute. All other code uses the names of `kernel.FULL`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hfedmoe.moe.anatomy import MoELayer, UnsupportedModelError, is_stacked
from hfedmoe.moe.experts.activation import Gate
from hfedmoe.moe.experts.frozen import ExpertBase, ListedWeights, SeparateBase, base_of
from hfedmoe.moe.experts.kernel import ExpertMath
from hfedmoe.moe.experts.store import ExpertStore, HeldBiases, HeldWeights
from hfedmoe.moe.families import WITHOUT_INTERFACE, Dispatch

Held = tuple[ExpertStore, int]
"""Where the base tensors of a layer are if they are not in the model: the store, and the layer's index."""


class Layout(Protocol):
    """The experts of one layer, as its family stores them."""

    stacked: bool
    dispatch: Dispatch | None
    """Set if the block does not call experts(hidden, top_k_index, top_k_weights) on stacked experts."""

    @property
    def num_local(self) -> int:
        """Number of experts that the model has in memory."""
        ...

    def math(self, scale: float, held: Held | None) -> ExpertMath:
        """How the experts compute; `scale` multiplies their low-rank terms. Raises UnsupportedModelError."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The base tensors, stacked `[E, ...]`, under the names of kernel.FULL."""
        ...

    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Compute with these stacks from now on (inverse of `tensors`).

        The model shares their memory. If the family has more rows than experts, the model copies them; `tensors`
        then returns the copies.
        """
        ...

    def names(self) -> list[dict[str, str]]:
        """Names of the base tensors in the model by those in kernel.FULL: one dict per expert, or one for stacks."""
        ...


class StackedLayout:
    """The layout of most families in transformers: one module with the weights of all experts."""

    stacked = True

    def __init__(self, layer: MoELayer) -> None:
        self._layer, self._experts = layer, layer.experts
        experts, build = layer.experts, WITHOUT_INTERFACE.get(type(layer.experts).__name__)
        if build is None and not hasattr(experts, "is_transposed"):
            raise UnsupportedModelError(f"{type(experts).__name__} does not use transformers' experts interface")
        if getattr(experts, "has_post_expert_norm", False):
            raise UnsupportedModelError(f"{type(experts).__name__}: experts with a norm of their own are not supported")
        self.dispatch: Dispatch | None = None if build is None else build.dispatch
        self._transposed: bool = experts.is_transposed if build is None else build.transposed
        self._gated: bool = getattr(experts, "has_gate", True)
        up = "gate_up_proj" if self._gated else "up_proj"
        self._attributes = {"up": up, "down": "down_proj"}
        if getattr(experts, "has_bias", False):
            self._attributes |= {"up_bias": f"{up}_bias", "down_bias": "down_proj_bias"}
        self._kept: tuple[ExpertBase, dict[str, Tensor]] | None = None

    @property
    def num_local(self) -> int:
        return int(self._experts.down_proj.shape[0])

    def math(self, scale: float, held: Held | None) -> ExpertMath:
        biases: tuple[Any, Any] = (None, None)
        if held is not None:
            base = _held_base(held, self._transposed)
            if "up_bias" in self._attributes:
                biases = HeldBiases(*held, "up_bias"), HeldBiases(*held, "down_bias")
        else:
            tensors = self.tensors()
            base = self._base(tensors["up"], tensors["down"])
            biases = tensors.get("up_bias"), tensors.get("down_bias")
        return ExpertMath(
            base=base,
            gate=self._gate(),
            scale=scale,
            up_bias=biases[0],
            down_bias=biases[1],
            transposed=self._transposed,
        )

    def _base(self, up: Tensor, down: Tensor) -> ExpertBase:
        """The base of these stacks; the same as last time if it has moved them and they are still there."""
        if self._kept is not None and all(map(_is_same, self._kept[1].values(), (up, down))):
            return self._kept[0]
        self._kept = None
        held = {"up": up, "down": down}

        def follow(kind: str, stack: Tensor) -> None:
            held[kind] = getattr(self._experts, self._attributes[kind]).data = stack
            self._kept = (base, held)

        movable = all(len(getattr(self._experts, self._attributes[kind])) == len(up) for kind in held)
        base = base_of(up, down, self._transposed, follow, movable)
        return base

    def tensors(self) -> dict[str, Tensor]:
        # Some families have rows for experts that compute nothing.
        return {kind: getattr(self._experts, name).data[: self.num_local] for kind, name in self._attributes.items()}

    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        self._kept = None
        number = self.num_local  # before any of them changes
        for kind, name in self._attributes.items():
            if kind in tensors:
                rest = getattr(self._experts, name).data[number:]  # rows for experts that compute nothing stay
                stack = torch.cat([tensors[kind], rest]) if len(rest) else tensors[kind]
                setattr(self._experts, name, nn.Parameter(stack, requires_grad=False))

    def names(self) -> list[dict[str, str]]:
        prefix = _prefix(self._layer)
        return [{kind: f"{prefix}.{name}" for kind, name in self._attributes.items()}]

    def _gate(self) -> Gate:
        experts = self._experts
        if not self._gated:
            return Gate(experts.act_fn)
        own = getattr(experts, "_apply_gate", None)
        plain = own is None or own.__name__ == "_default_apply_gate"  # activation(first half) * second half
        return Gate(own or partial(_halves, experts.act_fn), silu=plain and _is_silu(experts.act_fn))


class ListedLayout:
    """One module per expert, each with an up and a down projection (Switch Transformers)."""

    stacked = False

    def __init__(self, layer: MoELayer) -> None:
        self._layer, self._experts = layer, layer.experts
        self.dispatch: Dispatch | None = "one_hot"

    @property
    def num_local(self) -> int:
        return len(self._experts)

    def math(self, scale: float, held: Held | None) -> ExpertMath:
        members = self._members()
        up, down = zip(*(_linears(member) for member in members), strict=True)
        first = members[0]
        activation = next((getattr(first, n) for n in ("act", "act_fn", "activation_fn") if hasattr(first, n)), None)
        if activation is None or any(linear.bias is not None for linear in (*up, *down)):
            raise UnsupportedModelError(f"{type(first).__name__}: experts without an activation, or with biases")
        dropout = getattr(first, "dropout", None)
        if held is not None:
            base = _held_base(held)
        else:
            base = SeparateBase(
                ListedWeights([one.weight.data for one in up]), ListedWeights([one.weight.data for one in down])
            )
        return ExpertMath(
            base=base,
            gate=Gate(activation),
            scale=scale,
            dropout=dropout.p if isinstance(dropout, nn.Dropout) and first.training else 0.0,
        )

    def tensors(self) -> dict[str, Tensor]:
        up, down = zip(*(_linears(member) for member in self._members()), strict=True)
        return {
            "up": torch.stack([linear.weight.data for linear in up]),
            "down": torch.stack([linear.weight.data for linear in down]),
        }

    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        for member, up_row, down_row in zip(self._members(), tensors["up"], tensors["down"], strict=True):
            for linear, row in zip(_linears(member), (up_row, down_row), strict=True):
                linear.weight = nn.Parameter(row, requires_grad=False)

    def names(self) -> list[dict[str, str]]:
        prefix, entries = _prefix(self._layer), []
        for key, member in self._experts.named_children():
            linears = [name for name, child in member.named_children() if isinstance(child, nn.Linear)]
            entries.append(
                {kind: f"{prefix}.{key}.{n}.weight" for kind, n in zip(("up", "down"), linears, strict=True)}
            )
        return entries

    def _members(self) -> list[nn.Module]:
        return list(self._experts.children())


def layout_of(layer: MoELayer) -> Layout:
    """The layout of a layer's experts."""
    return StackedLayout(layer) if is_stacked(layer.experts) else ListedLayout(layer)


def _prefix(layer: MoELayer) -> str:
    attribute = next(name for name, child in layer.block.named_children() if child is layer.experts)
    return f"{layer.name}.{attribute}"


def _held_base(held: Held, transposed: bool = False) -> ExpertBase:
    return SeparateBase(HeldWeights(*held, "up", transposed), HeldWeights(*held, "down", transposed))


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory, seen in the same way."""
    alike = one.shape == other.shape and one.stride() == other.stride() and one.dtype == other.dtype
    return alike and one.device == other.device and one.data_ptr() == other.data_ptr()


def _halves(activation: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    gate, up = u.chunk(2, dim=-1)
    return activation(gate) * up


def _is_silu(activation: Any) -> bool:
    return (
        isinstance(activation, nn.SiLU)
        or type(activation).__name__ == "SiLUActivation"
        or activation is nn.functional.silu
    )


def _linears(member: nn.Module) -> list[nn.Linear]:
    linears = [child for child in member.children() if isinstance(child, nn.Linear)]
    if len(linears) != 2:
        raise UnsupportedModelError(f"{type(member).__name__}: expected an up and a down projection in each expert")
    return linears
