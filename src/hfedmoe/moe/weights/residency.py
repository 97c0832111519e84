"""Which experts live on a device: as a mask over a whole model, or carved, with absent experts gone from memory.

Both give the same outputs and gradients. The routers keep every row in either case: they are tiny, and the client
measures with them what it would use if it could.
"""

import torch
from torch import Tensor, nn

from hfedmoe.moe.anatomy import CARVED_FROM
from hfedmoe.moe.experts.state import ExpertState
from hfedmoe.moe.experts.store import ExpertStore
from hfedmoe.moe.experts.trained import full_experts


def check_resident(states: list[ExpertState], resident: list[Tensor]) -> None:
    """Raise ValueError unless every layer keeps at least top-k experts and the shapes fit."""
    if len(resident) != len(states):
        raise ValueError(f"resident sets for {len(resident)} layers, but the model has {len(states)} MoE layers")
    for state, mask in zip(states, resident, strict=True):
        layer = state.layer
        if mask.shape != (layer.num_experts,) or mask.dtype != torch.bool:
            raise ValueError(f"layer {layer.index}: expected bool [{layer.num_experts}], got {tuple(mask.shape)}")
        if int(mask.sum()) < layer.top_k:
            raise ValueError(
                f"layer {layer.index} keeps {int(mask.sum())} experts, but each token uses {layer.top_k}: "
                f"at least {sum(s.layer.top_k for s in states)} experts are needed over {len(states)} layers"
            )


def mask(states: list[ExpertState], resident: list[Tensor] | None) -> None:
    """Restrict routing to the resident experts (bool [E] per layer); None lifts the restriction.

    Raises:
        ValueError: a layer would keep fewer than top-k experts.
    """
    if resident is not None:
        check_resident(states, resident)
    for index, state in enumerate(states):
        if state.local is not None:
            raise ValueError("this model is carved: its absent experts are gone, so its residency cannot change")
        state.resident = None if resident is None or bool(resident[index].all()) else resident[index].to(_device(state))


def carve(states: list[ExpertState], resident: list[Tensor]) -> None:
    """Drop every expert that is not resident from memory, in place; trained tensors are reduced alike.

    Raises:
        ValueError: a layer would keep fewer than top-k experts, or the model is carved already.
    """
    mask(states, resident)
    for state, keep in zip(states, resident, strict=True):
        index = keep.nonzero()[:, 0]
        if state.layout.stacked:
            _carve_stacks(state, index)
        else:
            _drop_members(state.layer.experts, keep.tolist())
        if state.trained is not None:
            state.trained = state.trained.select(index.to(_device(state)))
        _restrict(state, keep)


def reside(states: list[ExpertState], store: ExpertStore, resident: list[Tensor], whole: bool = False) -> None:
    """Hold exactly these experts (bool [E] per layer), reading and dropping the difference.

    Trained tensors start anew: what a device trains in a round is what the server sends for it.

    Args:
        whole: the base tensors themselves are trained.

    Raises:
        ValueError: a layer would keep fewer than top-k experts.
        CheckpointError: an expert cannot be read.
    """
    check_resident(states, resident)
    for state in states:
        state.trained = None
    if whole:
        for state, stacks in zip(states, store.reside_stacked(resident), strict=True):
            state.trained = full_experts(stacks)
    else:
        store.reside(resident)
    for state, keep in zip(states, resident, strict=True):
        _restrict(state, keep)
        if state.begin is not None:
            state.trained = state.begin(keep.nonzero()[:, 0])


def _restrict(state: ExpertState, keep: Tensor) -> None:
    """Only these experts are in memory, in ascending order."""
    held = int(keep.sum())
    local = torch.full((len(keep) + 1,), held, dtype=torch.int64)
    local[:-1][keep] = torch.arange(held)
    state.resident = keep.to(_device(state))
    state.local = local.to(_device(state))


def _carve_stacks(state: ExpertState, index: Tensor) -> None:
    layer = state.layer
    setattr(layer.experts, CARVED_FROM, layer.num_experts)
    tensors = state.tensors()
    shared = tensors["up"].stride(0) == 0  # copies of one matrix stay one matrix
    index = index.to(tensors["up"].device)
    state.set_tensors(
        {n: t[:1].expand(len(index), *t.shape[1:]) if shared else t.index_select(0, index) for n, t in tensors.items()}
    )


def _drop_members(experts: nn.Module, keep: list[bool]) -> None:
    for name, kept in zip([name for name, _ in experts.named_children()], keep, strict=True):
        if not kept:
            delattr(experts, name)


def _device(state: ExpertState) -> torch.device:
    return next(state.layer.router.parameters()).device
