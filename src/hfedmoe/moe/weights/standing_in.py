"""Let merged experts stand in for those that a device does not hold: the router then chooses among all experts."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hfedmoe.moe.experts.kernel import FULL
from hfedmoe.moe.experts.merged import Mixture, Read, merged_of
from hfedmoe.moe.experts.state import ExpertState


def stand_in(state: ExpertState, mixtures: Sequence[Mixture], rows: Mapping[str, Tensor]) -> None:
    """Make merged experts of a layer.

    Args:
        rows: the trained tensors [E, ...] of all experts of the layer, by name; they are part of what is merged.
    """
    originals = state.originals()
    read = _with_trained(state, originals.read, rows)
    state.merged = merged_of(mixtures, state.layer.num_experts, originals, read)


def _with_trained(state: ExpertState, base: Read, rows: Mapping[str, Tensor]) -> Read:
    """The experts with what was trained so far: their LoRA products added, or trained weights in place of the base."""
    transposed = state.math().transposed
    rows = dict(rows)
    fixed = state.trained
    if fixed is not None and "up_b" in rows and "up_a" not in rows:  # A is not sent, and is the same everywhere
        if state.begin is not None:
            fixed = state.begin(torch.arange(state.layer.num_experts))
        rows |= {name: fixed.stacks[name] for name in fixed.fixed}

    def read(expert: int) -> dict[str, Tensor]:
        now = base(expert)
        for name in FULL:
            if name in rows:
                now[name] = rows[name][expert].to(now[name].device)
        for side in ("up", "down"):
            if f"{side}_b" in rows and state.trained is not None:
                a, b = rows[f"{side}_a"][expert].float(), rows[f"{side}_b"][expert].float()
                delta = state.trained.scale * (b.to(a.device) @ a)
                now[side] = now[side].float() + (delta.t() if transposed else delta).to(now[side].device)
        return now

    return read
