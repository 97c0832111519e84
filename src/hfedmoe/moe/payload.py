"""Take trained tensors out of a model to send them, and put received ones into it.

Rows of experts are sent in ascending order of the experts, so one bit per expert says which they are.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from hfedmoe.files.blob import Rows
from hfedmoe.moe.attention import A, B
from hfedmoe.moe.experts.state import ExpertState
from hfedmoe.moe.model import MoEModel

T = TypeVar("T")


class MismatchError(ValueError):
    """Tensors do not fit the model: wrong name, shape or number."""


def layer_of(name: str) -> int:
    """The MoE layer of a sent tensor `experts.{layer}.*` or `router.{layer}.*`."""
    return int(name.split(".")[1])


def kind_of(name: str) -> str:
    """What a sent tensor is: "router", "experts", "shared", "scale" or "own"."""
    return name.split(".", 1)[0]


def public(tensors: Mapping[str, T], private: Collection[str]) -> dict[str, T]:
    """The tensors whose kinds are not private."""
    return {name: tensor for name, tensor in tensors.items() if kind_of(name) not in private}


def lora_pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """The LoRA pairs (A, B) among the names of sent tensors, of experts and of the attention."""
    names = set(names)
    pairs = [(name, name[:-1] + "b") for name in names if name.startswith("experts.") and name.endswith("_a")]
    pairs += [(name, name.replace(A, B)) for name in names if name.startswith("shared.") and A in name]
    return sorted(pair for pair in pairs if pair[1] in names)


def expert_shapes(model: MoEModel) -> dict[str, tuple[int, ...]]:
    """Shape [E, ...] of every trained expert tensor, over all experts of its layer (also in a carved model)."""
    return {
        f"experts.{state.layer.index}.{name}": (state.layer.num_experts, *stack.shape[1:])
        for state in _trained(model)
        for name, stack in _stacks(state).items()
    }


def whole_tensors(model: MoEModel) -> dict[str, Tensor]:
    """Gates, shared tensors, scales and own experts, which are not sent by rows: the live tensors, not copies."""
    return model.routers | model.shared | model.scales | model.own


def global_tensors(model: MoEModel) -> dict[str, Tensor]:
    """A copy of everything that is trained, over all experts: the federation's state."""
    tensors = {name: tensor.detach().clone() for name, tensor in whole_tensors(model).items()}
    for state in _trained(model):
        for name, stack in _stacks(state).items():
            tensors[f"experts.{state.layer.index}.{name}"] = stack.clone()
    return tensors


def pack(tensors: dict[str, Tensor], experts: list[Tensor]) -> dict[str, Tensor]:
    """The tensors for a client: `tensors` (from `global_tensors`) with only the rows of some experts.

    Args:
        experts: bool [E] per layer.
    """
    chosen = select(tensors, experts)
    return {name: one.tensor[one.index] if isinstance(one, Rows) else one for name, one in chosen.items()}


def select(tensors: Mapping[str, Tensor], experts: list[Tensor]) -> dict[str, Tensor | Rows]:
    """As `pack`, for a message that is written at once: rows are not copied before."""
    index = [None if bool(keep.all()) else keep.nonzero()[:, 0] for keep in experts]
    chosen: dict[str, Tensor | Rows] = {}
    for name, tensor in tensors.items():
        rows = index[layer_of(name)] if kind_of(name) == "experts" else None
        chosen[name] = tensor if rows is None else Rows(tensor, rows.to(tensor.device))
    return chosen


def extract(model: MoEModel, experts: list[Tensor], live: bool = False) -> dict[str, Tensor]:
    """The tensors from a client: gates and shared tensors, and the rows of some (resident) experts.

    Args:
        live: the model's own tensors instead of copies where that is possible: for a message that is written at once.
    """
    packed = {
        name: tensor.detach() if live else tensor.detach().clone() for name, tensor in whole_tensors(model).items()
    }
    for state in _trained(model):
        rows = _local_rows(state, experts[state.layer.index])
        for name, stack in _stacks(state).items():
            whole = live and torch.equal(rows, torch.arange(len(stack), device=rows.device))
            packed[f"experts.{state.layer.index}.{name}"] = stack.detach() if whole else stack.index_select(0, rows)
    return packed


def check(model: MoEModel, packed: dict[str, Tensor], experts: list[Tensor]) -> None:
    """Raise MismatchError unless these are the tensors of a model with the rows of some experts, bool [E] per layer."""
    expected = expected_shapes(model, experts)
    if set(packed) != set(expected):
        wrong = sorted(set(packed) ^ set(expected))
        raise MismatchError(f"tensors do not match the model: {', '.join(wrong[:3])}{'...' if len(wrong) > 3 else ''}")
    for name, shape in expected.items():
        if tuple(packed[name].shape) != shape:
            raise MismatchError(f"{name}: shape {tuple(packed[name].shape)}, expected {shape}")


@torch.no_grad()
def load(model: MoEModel, packed: dict[str, Tensor], experts: list[Tensor]) -> None:
    """Put received tensors into the model, in place: gates and shared tensors whole, rows for the given experts.

    Raises:
        MismatchError: a tensor is missing, unknown or has the wrong shape.
    """
    check(model, packed, experts)
    for name, tensor in whole_tensors(model).items():
        tensor.copy_(packed[name])
    for state in _trained(model):
        rows = _local_rows(state, experts[state.layer.index])
        for name, stack in _stacks(state).items():
            stack.index_copy_(0, rows, packed[f"experts.{state.layer.index}.{name}"].to(stack))


def initial_tensors(model: MoEModel) -> dict[str, Tensor]:
    """A copy of the trained tensors, for `restore`; of a carved model without experts, as `restore` drops them."""
    if model.masked:
        return global_tensors(model)
    return {name: tensor.detach().clone() for name, tensor in whole_tensors(model).items()}


@torch.no_grad()
def restore(model: MoEModel, initial: dict[str, Tensor]) -> None:
    """Put `initial_tensors` back, so that nothing of an earlier client is left; a carved model drops its experts."""
    if model.masked:
        load_all(model, initial)
        return
    model.release()
    for name, tensor in whole_tensors(model).items():
        tensor.copy_(initial[name])


@torch.no_grad()
def reset(model: MoEModel, initial: dict[str, Tensor]) -> None:
    """As `restore`, but a carved model keeps its experts: their trained tensors are new when they are made resident."""
    if model.masked:
        load_all(model, initial)
        return
    for name, tensor in whole_tensors(model).items():
        tensor.copy_(initial[name])


def load_all(model: MoEModel, packed: dict[str, Tensor]) -> None:
    """As `load`, over all experts: the inverse of `global_tensors`. Raises MismatchError as `load`."""
    load(model, packed, [torch.ones(number, dtype=torch.bool) for number in model.num_experts])


def expected_shapes(model: MoEModel, experts: list[Tensor]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that is sent with the rows of `experts` (bool [E] per layer)."""
    shapes = {name: tuple(tensor.shape) for name, tensor in whole_tensors(model).items()}
    for name, shape in expert_shapes(model).items():
        shapes[name] = (int(experts[layer_of(name)].sum()), *shape[1:])
    return shapes


def _trained(model: MoEModel) -> Iterator[ExpertState]:
    return (state for state in model.states if state.trained is not None)


def _stacks(state: ExpertState) -> dict[str, Tensor]:
    """The stacks that are sent."""
    assert state.trained is not None
    return {name: state.trained.stacks[name] for name in state.trained.travelling}


def _local_rows(state: ExpertState, experts: Tensor) -> Tensor:
    index = experts.nonzero()[:, 0].to(next(state.layer.router.parameters()).device)
    return index if state.local is None else state.local[index]
