"""Our experts forward, registered with transformers' experts interface, and what it knows about each layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hfedmoe.moe.anatomy import MoELayer, UnsupportedModelError, is_stacked
from hfedmoe.moe.base import ExpertBase, ListedWeights, SeparateBase, base_of
from hfedmoe.moe.grouping import Groups, group_pairs
from hfedmoe.moe.kernel import ExpertMath, experts_forward
from hfedmoe.moe.store import ExpertStore, HeldBiases, HeldWeights
from hfedmoe.moe.trained import TrainedExperts

IMPLEMENTATION = "hfedmoe"
"""Name under which the forward is registered: `model.set_experts_implementation("hfedmoe")`."""
STATE = "_hfedmoe"

Observer = Callable[[Tensor, Tensor], None]
"""Called with (indices [T, K], weights [T, K]) of the routed tokens before the experts run."""


class ExpertState:
    """One layer's experts on this device: which are here, which are trained, and how they compute."""

    def __init__(self, layer: MoELayer, store: ExpertStore | None = None) -> None:
        self.layer = layer
        self.store = store
        """Holds the base tensors if they are not parameters of the model."""
        self.stacked = is_stacked(layer.experts)
        self.grouping: Callable[..., Groups] = group_pairs
        self.trained: TrainedExperts | None = None
        self.begin: Callable[[Tensor], TrainedExperts] | None = None
        """Fresh trained tensors for the experts with these indices, where a store reads experts as they are wanted."""
        self.resident: Tensor | None = None
        """bool [E]: experts that may be used; None means all."""
        self.local: Tensor | None = None
        """int64 [E + 1]: place of each expert in the (carved) stacks; None where experts keep their own index."""
        self.trainable: Tensor | None = None
        """bool [E]: experts that build a graph for this batch; None means all."""
        self.off_budget = "frozen"
        self.observer: Observer | None = None
        self.norms: Callable[[Tensor], None] | None = None
        """Called with ||w f(x)|| of every pair [T, K], 0 where no expert ran; None: not measured (cheaper)."""

    @property
    def num_local(self) -> int:
        """Experts that are present in memory."""
        if self.store is not None:
            return len(self.store.present[self.layer.index])
        if self.stacked:
            return int(self.layer.experts.down_proj.shape[0])
        return len(self.layer.experts)

    def math(self) -> ExpertMath:
        """How the experts of this layer compute."""
        scale = 1.0 if self.trained is None else self.trained.scale
        experts, held = self.layer.experts, None
        if self.store is not None:
            held = self.store, self.layer.index
        return _stacked_math(experts, scale, held) if self.stacked else _listed_math(experts, scale, held)

    def expert_bytes(self) -> int:
        """Bytes of the base tensors of one expert, as they are held."""
        if self.store is not None:
            return self.store.expert_bytes(self.layer.index)
        return sum(p.numel() * p.element_size() for p in self.layer.experts.parameters()) // self.num_local

    def tensors(self) -> dict[str, Tensor]:
        """The base tensors, stacked `[E, ...]`, under the names of kernel.FULL; without contents if a store has any."""
        experts = self.layer.experts
        if not self.stacked:
            members = _members(experts)
            up, down = zip(*(_linears(member) for member in members), strict=True)
            return {
                "up": torch.stack([linear.weight.data for linear in up]),
                "down": torch.stack([linear.weight.data for linear in down]),
            }
        up_name = "gate_up_proj" if experts.has_gate else "up_proj"
        found = {"up": getattr(experts, up_name).data, "down": experts.down_proj.data}
        if experts.has_bias:
            found |= {"up_bias": getattr(experts, f"{up_name}_bias").data, "down_bias": experts.down_proj_bias.data}
        return found

    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Compute with these stacks from now on (the other way round of `tensors`); the model shares their memory."""
        experts = self.layer.experts
        if not self.stacked:
            for member, up_row, down_row in zip(_members(experts), tensors["up"], tensors["down"], strict=True):
                for linear, row in zip(_linears(member), (up_row, down_row), strict=True):
                    linear.weight = nn.Parameter(row, requires_grad=False)
            return
        up_name = "gate_up_proj" if experts.has_gate else "up_proj"
        for name, attribute in (
            ("up", up_name),
            ("down", "down_proj"),
            ("up_bias", f"{up_name}_bias"),
            ("down_bias", "down_proj_bias"),
        ):
            if name in tensors:
                setattr(experts, attribute, nn.Parameter(tensors[name], requires_grad=False))

    def __call__(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The experts forward: hidden [T, H], index and weights [T, K] -> [T, H]."""
        if self.observer is not None:
            self.observer(index, weights)
        device_type = hidden.device.type
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return self._forward(hidden.to(torch.get_autocast_dtype(device_type)), index, weights).to(hidden.dtype)
        return self._forward(hidden, index, weights)

    def _forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        math = self.math()
        top_k = index.shape[1]
        experts = index.reshape(-1)
        trainable, here = self.trainable, self.resident
        if self.local is not None:
            experts = self.local[experts]
            trainable = None if trainable is None else trainable[self.local[:-1] < self.num_local]
            here = None  # what is absent has no place in the stacks
        # Routers limited to groups may pick absent experts, with weight 0: they must not run in a masked model either.
        chosen = here if trainable is None else trainable if here is None else trainable & here
        flat = weights.reshape(-1)
        groups = self.grouping(experts, self.num_local, top_k, chosen)
        if self.norms is None:
            out = self._grouped(math, hidden, flat, groups)
        else:
            rows = self._pairs(math, hidden, groups) * flat[groups.pair, None].to(hidden.dtype)
            self._report_norms(rows, groups, index.shape)
            out = hidden.new_zeros(hidden.shape).index_add(0, groups.token, rows)
        if trainable is not None and self.off_budget == "frozen":
            rest = self.grouping(experts, self.num_local, top_k, ~trainable if here is None else ~trainable & here)
            with torch.no_grad():
                rows = self._pairs(math, hidden, rest)
            # The gate still learns from experts over the budget; they themselves and what lies below them do not.
            out = out.index_add(0, rest.token, rows * flat[rest.pair, None].to(rows.dtype))
        return out

    def _grouped(self, math: ExpertMath, hidden: Tensor, flat: Tensor, groups: Groups) -> Tensor:
        if self.trained is None:
            return experts_forward(math, hidden, flat, groups, (), [])
        leaves = self.trained.of([expert for expert, _, _ in groups.spans])
        return experts_forward(math, hidden, flat, groups, self.trained.names, leaves)

    def _pairs(self, math: ExpertMath, hidden: Tensor, groups: Groups) -> Tensor:
        """The unweighted output of every pair [S, H]: each pair is treated as a token of its own."""
        own = torch.arange(groups.size, device=hidden.device)
        alone = Groups(groups.size, own, own, groups.spans, own[:, None])
        return self._grouped(math, hidden[groups.token], hidden.new_ones(groups.size), alone)

    def _report_norms(self, rows: Tensor, groups: Groups, shape: torch.Size) -> None:
        norms = torch.zeros(shape.numel(), device=rows.device)
        norms[groups.pair] = rows.detach().float().norm(dim=1)
        assert self.norms is not None
        self.norms(norms.view(shape))


def attach(model: Any, layers: list[MoELayer], store: ExpertStore | None = None) -> list[ExpertState]:
    """Let every MoE layer of `model` compute with our experts forward; returns the state of each.

    Raises:
        UnsupportedModelError: the experts of a layer are of a build that the forward does not know.
    """
    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _registered_forward)
    states = []
    for layer in layers:
        state = ExpertState(layer, store)
        state.math()  # refuse now rather than in the first step
        object.__setattr__(layer.experts, STATE, state)
        if not state.stacked:
            # Families with a module per expert have no interface to register with: the instance gets its forward.
            object.__setattr__(layer.experts, "forward", _one_hot_forward(state))
        states.append(state)
    if any(state.stacked for state in states):
        model.set_experts_implementation(IMPLEMENTATION)
    return states


def _registered_forward(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return getattr(module, STATE)(hidden, index, weights)


def _one_hot_forward(state: ExpertState) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The forward of Switch Transformers' experts: one-hot dispatch [T, 1, E], all zero for tokens over capacity."""

    def forward(hidden: Tensor, dispatch: Tensor, weights: Tensor) -> Tensor:
        index = dispatch.argmax(dim=-1)
        index = index.masked_fill(dispatch.sum(dim=-1) == 0, state.layer.num_experts)
        return state(hidden, index, weights)

    return forward


Held = tuple[ExpertStore, int]
"""Where the base tensors of a layer are, if not in the model: the store, and the layer's index."""


def _stacked_math(experts: Any, scale: float, held: Held | None) -> ExpertMath:
    name = type(experts).__name__
    if getattr(experts, "has_post_expert_norm", False):
        raise UnsupportedModelError(f"{name}: experts with a norm of their own are not supported")
    if not hasattr(experts, "is_transposed"):
        raise UnsupportedModelError(f"{name} does not use transformers' experts interface")
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    biases: tuple[Any, Any] = (None, None)
    if held is not None:
        base = _held_base(held, experts.is_transposed)
        if experts.has_bias:
            biases = HeldBiases(*held, "up_bias"), HeldBiases(*held, "down_bias")
    else:
        base = base_of(getattr(experts, up_name).data, experts.down_proj.data, experts.is_transposed)
        if experts.has_bias:
            biases = getattr(experts, f"{up_name}_bias").data, experts.down_proj_bias.data
    plain = experts.has_gate and getattr(experts._apply_gate, "__name__", "") == "_default_apply_gate"
    return ExpertMath(
        base=base,
        gate=experts._apply_gate if experts.has_gate else experts.act_fn,
        silu_gate=plain and _is_silu(experts.act_fn),
        scale=scale,
        up_bias=biases[0],
        down_bias=biases[1],
        transposed=experts.is_transposed,
    )


def _held_base(held: Held, transposed: bool = False) -> ExpertBase:
    return SeparateBase(HeldWeights(*held, "up", transposed), HeldWeights(*held, "down", transposed))


def _is_silu(activation: Any) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"


def _listed_math(experts: nn.Module, scale: float, held: Held | None) -> ExpertMath:
    members = _members(experts)
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
        gate=activation,
        scale=scale,
        dropout=dropout.p if isinstance(dropout, nn.Dropout) and first.training else 0.0,
    )


def parameter_names(layer: MoELayer) -> list[dict[str, str]]:
    """Names in the model of the base tensors of each expert, under the names of kernel.FULL.

    One entry per expert; where experts are stacked, one entry for all of them.
    """
    attribute = next(name for name, child in layer.block.named_children() if child is layer.experts)
    prefix, experts = f"{layer.name}.{attribute}", layer.experts
    if is_stacked(experts):
        up_name = "gate_up_proj" if experts.has_gate else "up_proj"
        names = {"up": up_name, "down": "down_proj"}
        if experts.has_bias:
            names |= {"up_bias": f"{up_name}_bias", "down_bias": "down_proj_bias"}
        return [{kind: f"{prefix}.{name}" for kind, name in names.items()}]
    entries = []
    for key, member in experts.named_children():
        linears = [name for name, child in member.named_children() if isinstance(child, nn.Linear)]
        entries.append({kind: f"{prefix}.{key}.{n}.weight" for kind, n in zip(("up", "down"), linears, strict=True)})
    return entries


def _members(experts: nn.Module) -> list[nn.Module]:
    return list(experts.children())


def _linears(member: nn.Module) -> list[nn.Linear]:
    linears = [child for child in member.children() if isinstance(child, nn.Linear)]
    if len(linears) != 2:
        raise UnsupportedModelError(f"{type(member).__name__}: expected an up and a down projection in each expert")
    return linears
