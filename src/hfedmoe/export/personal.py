"""A client's personal sub-model: a standard checkpoint with only the client's most valuable experts.

A standard checkpoint has the same number of experts in every layer, so a client's budget over all layers becomes its
mean per layer. Other experts are also removed from the routers; the outputs equal those of the whole model with these
experts masked.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfedmoe.errors import UserError
from hfedmoe.export.merged import skeleton
from hfedmoe.moe.anatomy import text_config
from hfedmoe.moe.model import MoEModel

COUNT_KEYS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
)
"""Keys for the number of experts per layer in the configs of different families."""


@dataclass(frozen=True)
class Scores:
    """A client's scores of the experts in the last round in which it took part; arrays [L, E]."""

    round: int
    resident: np.ndarray
    importance: np.ndarray
    usage: np.ndarray

    @property
    def held(self) -> int:
        """Number of experts that it held over all layers, as its budget allowed."""
        return int(self.resident.sum())


def last_scores(rows: Any, client: int) -> Scores:
    """A client's last recorded scores in the rows of experts.npy (None: the run has no such file).

    Raises:
        UserError: the client took part in no round, or no client has recorded scores.
    """
    if rows is None or len(rows) == 0:
        raise UserError(
            f"--client {client}: the run has no experts.npy with the clients' scores of experts; finish a round, or "
            "use --as merged"
        )
    own: Any = np.flatnonzero(rows["client"] == client)
    if len(own) == 0:
        known = ", ".join(_ranges(sorted({int(number) for number in rows["client"]})))
        raise UserError(
            f"--client {client}: took part in no round yet, so its experts have no scores; choose one that did: {known}"
        )
    last = rows[own[-1]]
    return Scores(int(last["round"]), *(np.array(last[name]) for name in ("resident", "importance", "usage")))


def _ranges(numbers: list[int]) -> Iterator[str]:
    """Sorted numbers as "0-3", "5", "7-8"."""
    first = 0
    for i, number in enumerate(numbers):
        if i + 1 == len(numbers) or numbers[i + 1] != number + 1:
            yield f"{number}" if first == i else f"{numbers[first]}-{number}"
            first = i + 1


def experts_per_layer(held: int, num_experts: list[int], top_k: int, config: Any) -> int:
    """Number of experts in each layer of a client's sub-model: the mean of those held, rounded down, at least top-k.

    A router that first chooses groups of experts keeps the same number in every group. It needs a minimum of each: two
    if it scores a group by its two best experts.

    Raises:
        UserError: too few experts for such a router.
    """
    number = min(max(held // len(num_experts), top_k), *num_experts)
    groups, chosen, least = router_groups(config)
    if groups == 1:
        return number
    needed = max(least, -(-top_k // chosen))
    if number // groups < needed:
        raise UserError(
            f"{config.model_type} routes by {groups} groups of experts and needs {needed} experts of each group, "
            f"{groups * needed} per layer, but this client holds {number} per layer; use --as merged"
        )
    return number // groups * groups


def router_groups(config: Any) -> tuple[int, int, int]:
    """Groups of experts per layer, how many of them a token may use, and the minimum number of experts in a group."""
    text = text_config(config)
    groups = getattr(text, "n_group", None) or 1
    method = getattr(text, "topk_method", None)
    if method == "greedy":
        return 1, 1, 1  # DeepSeek-V2: the config has groups, but this router does not use them
    by_maximum = method == "group_limited_greedy"
    return groups, getattr(text, "topk_group", None) or groups, 1 if by_maximum else 2


def most_valuable(scores: Scores, number: int, num_experts: list[int], groups: int = 1) -> list[Tensor]:
    """The experts to keep, bool [E] per layer: residents first, then by importance, usage and index.

    Args:
        number: experts per layer, shared equally by `groups` groups of equal size.
    """
    kept = []
    for layer, total in enumerate(num_experts):
        keys = (np.nan_to_num(row[layer, :total], nan=-np.inf) for row in (scores.usage, scores.importance))
        usage, importance = keys
        order = np.lexsort((np.arange(total), -usage, -importance, ~scores.resident[layer, :total]))
        keep = torch.zeros(total, dtype=torch.bool)
        for group in range(groups):
            own = [int(e) for e in order if e * groups // total == group]
            keep[own[: number // groups]] = True
        kept.append(keep)
    return kept


def shrink(model: MoEModel, keep: list[Tensor]) -> Any:
    """A stock model of the same class with only some experts; unchanged tensors share memory with `model`.

    Args:
        model: merged (see `merged.merge`).
        keep: bool [E] per layer, the same number in every layer.

    Raises:
        UserError: the family's config has no number of experts to change, or a layer chooses experts by token id.
    """
    (number,) = {int(mask.sum()) for mask in keep}
    config = model.config
    fixed = next((layer for layer in model.layers if layer.fixed_routing), None)
    if fixed is not None:
        raise UserError(
            f"{config.model_type}: {fixed.name} chooses experts by token from a fixed table, so none can be left out; "
            "use --as merged"
        )
    small = skeleton(model.model, **_with_count(config, model.num_experts, number))
    sources = _sources(model, keep)
    have, tensors = model.model.state_dict(), {}
    for name, wanted in small.state_dict().items():
        source, experts = sources(name)
        tensor = have.get(source)
        if tensor is not None and experts is not None:
            for dim in [d for d, (a, b) in enumerate(zip(tensor.shape, wanted.shape, strict=True)) if a != b][:1]:
                if tensor.shape[dim] >= model.num_experts[0]:
                    # After the experts there may be entries for shared experts or zero experts.
                    behind = torch.arange(model.num_experts[0], tensor.shape[dim])
                    tensor = tensor.index_select(dim, torch.cat([experts, behind]).to(tensor.device))
        if tensor is None or tensor.shape != wanted.shape:
            raise UserError(f"{config.model_type}: {name} cannot be reduced to {number} experts; use --as merged")
        tensors[name] = tensor
    small.load_state_dict(tensors, strict=True, assign=True)
    small.tie_weights()
    small.generation_config = model.model.generation_config
    return small


def _with_count(config: Any, num_experts: list[int], number: int) -> dict[str, Any]:
    """Key -> new value, for the keys of the text config that count experts."""
    text, total = text_config(config), num_experts[0]
    changes: dict[str, Any] = {}
    for key in COUNT_KEYS:
        value = getattr(text, key, None)
        if value == total:
            changes[key] = number
        elif isinstance(value, list) and set(value) == {total}:
            changes[key] = [number] * len(value)
    if not changes or set(num_experts) != {total}:
        raise UserError(
            f"{config.model_type}: its config has no number of experts per layer to change; use --as merged"
        )
    return changes


def _sources(model: MoEModel, keep: list[Tensor]) -> Any:
    """A function: name -> (name of the source tensor, int64 experts to keep if a dimension differs)."""
    kept = [mask.nonzero()[:, 0] for mask in keep]
    renamed: dict[str, str] = {}
    for state, experts in zip(model.states, kept, strict=True):
        if not state.layout.stacked:
            entries = state.layout.names()
            for new, old in enumerate(experts.tolist()):
                renamed |= {entries[new][kind]: entries[old][kind] for kind in entries[old]}
    prefixes = [(f"{layer.name}.", experts) for layer, experts in zip(model.layers, kept, strict=True)]

    def source(name: str) -> tuple[str, Tensor | None]:
        return renamed.get(name, name), next((e for prefix, e in prefixes if name.startswith(prefix)), None)

    return source
