"""Which experts a device has: a mask over a whole model, or only the resident experts in memory.

Both give the same outputs and gradients. The routers keep all their rows: they are small, and the client needs them to
measure which absent experts it would have used.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hfedmoe.moe.experts.state import ExpertState
from hfedmoe.moe.experts.store import ExpertStore
from hfedmoe.moe.experts.trained import full_experts


def check_resident(states: list[ExpertState], resident: list[Tensor], at_least: Sequence[int] | None = None) -> None:
    """Raise ValueError unless every layer keeps `at_least` experts (None: its top-k) and the shapes fit."""
    if len(resident) != len(states):
        raise ValueError(f"resident sets for {len(resident)} layers, but the model has {len(states)} MoE layers")
    for state, mask in zip(states, resident, strict=True):
        layer = state.layer
        if mask.shape != (layer.num_experts,) or mask.dtype != torch.bool:
            raise ValueError(f"layer {layer.index}: expected bool [{layer.num_experts}], got {tuple(mask.shape)}")
        least = layer.top_k if at_least is None else at_least[layer.index]
        if int(mask.sum()) < least:
            needed = sum(s.layer.top_k for s in states) if at_least is None else sum(at_least)
            raise ValueError(
                f"layer {layer.index} keeps {int(mask.sum())} experts, but needs {least} for each token: "
                f"at least {needed} experts are needed over {len(states)} layers"
            )


def mask(states: list[ExpertState], resident: list[Tensor] | None) -> None:
    """Restrict routing to the resident experts (bool [E] per layer); None removes the restriction.

    Raises:
        ValueError: the model holds only its residents.
    """
    for index, state in enumerate(states):
        if state.local is not None:
            raise ValueError("this model holds only its resident experts: set_resident reads and drops experts instead")
        state.resident = None if resident is None or bool(resident[index].all()) else resident[index].to(_device(state))


def reside(states: list[ExpertState], store: ExpertStore, resident: list[Tensor], whole: bool = False) -> None:
    """Hold exactly these experts (bool [E] per layer), reading and dropping the difference.

    Trained tensors start new: the server sends their values for each round.

    Args:
        whole: the base tensors themselves are trained.

    Raises:
        CheckpointError: an expert cannot be read.
    """
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
    """Restrict the state to these experts, which are in memory in ascending order."""
    held = int(keep.sum())
    local = torch.full((len(keep) + 1,), held, dtype=torch.int64)
    local[:-1][keep] = torch.arange(held)
    state.resident = keep.to(_device(state))
    state.local = local.to(_device(state))


def _device(state: ExpertState) -> torch.device:
    return next(state.layer.router.parameters()).device
