"""The memory and the FLOPs of a computation, operation by operation.

A `Trace` watches the tensors that are made inside it, real or fake. Every storage counts once, from the operation that
makes it until nothing refers to it. Tensors from outside (weights) do not count.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_LIKE = {
    torch.ops.aten.addmm_: torch.ops.aten.addmm,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ),
}
"""Operations that torch's FLOP counter does not know, and known ones that compute the same."""


def _grouped_flops(left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    """FLOPs of rows by expert [S, K] x [E, K, N] and of outer products [M, S] x [S, N]."""
    return 2 * left.numel() * right.shape[-1]


_COUNTED_HERE = {torch.ops.aten._grouped_mm: _grouped_flops}
"""Operations that torch's FLOP counter does not know, without a known one that computes the same."""


@dataclass
class Timeline:
    """Bytes taken and freed, in order, each with the index of its kind."""

    kinds: list[str]
    kind: np.ndarray
    """int64 [N]: index into `kinds`."""
    delta: np.ndarray
    """int64 [N]: bytes; negative if memory is freed."""

    def peak(self, weights: dict[str, float] | None = None) -> dict[str, int]:
        """Bytes by kind at the moment when their weighted sum is largest (weights are 1 unless given)."""
        factor = np.array([(weights or {}).get(kind, 1.0) for kind in self.kinds])
        weighted = self.delta * factor[self.kind]
        total = np.cumsum(weighted)
        if len(total) == 0 or total.max() <= 0:
            return dict.fromkeys(self.kinds, 0)
        until = int(total.argmax()) + 1
        sums = np.bincount(self.kind[:until], weights=weighted[:until], minlength=len(self.kinds))
        return {kind: round(value) for kind, value in zip(self.kinds, sums.tolist(), strict=True)}


@dataclass
class _Storage:
    bytes: int
    kind: str


@dataclass
class Segment:
    """A part of a trace between two marks."""

    label: Any
    events: list[tuple[int, int]] = field(default_factory=list)
    """(storage, bytes taken or, negative, freed)."""
    flops: int = 0


class Trace(TorchDispatchMode):
    """Context manager: follows the tensors made inside, and counts FLOPs.

    Args:
        known: tensors that do not count; their views do not count either.
        kind: gives the kind of a new tensor ("activations" by default).
    """

    def __init__(self, known: Iterable[Tensor] = (), kind: Callable[[Tensor], str] = lambda _: "activations") -> None:
        super().__init__()
        self._kind = kind
        self._outside = [tensor.untyped_storage() for tensor in known]  # held, so that no address is reused
        self._alive: dict[int, int | None] = {storage._cdata: None for storage in self._outside}
        self._storages: list[_Storage] = []
        self.segments = [Segment(None)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # called more often than all computations
        out = func(*args, **(kwargs or {}))
        for leaf in out if isinstance(out, tuple | list) else (out,):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        packet = func._overloadpacket
        count = _COUNTED_HERE.get(packet) or flop_registry.get(_LIKE.get(packet, packet))
        if count is not None:
            self.segments[-1].flops += int(count(*args, **(kwargs or {}), out_val=out))
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        number, size = len(self._storages), storage.nbytes()
        self._alive[key] = number
        self._storages.append(_Storage(size, self._kind(tensor)))
        self.segments[-1].events.append((number, size))
        weakref.finalize(storage, self._gone, key, number)

    def _gone(self, key: int, number: int) -> None:
        self._alive.pop(key, None)
        self.segments[-1].events.append((number, -self._storages[number].bytes))

    def mark(self, label: Any) -> None:
        """Begin a new segment."""
        self.segments.append(Segment(label))

    def tag(self, tensor: Tensor, kind: str) -> None:
        """Set the kind of a tensor made inside, also for the past."""
        number = self._alive.get(tensor.untyped_storage()._cdata)
        if number is not None:
            self._storages[number].kind = kind

    def timeline(self, segments: Iterable[Segment] | None = None) -> Timeline:
        """The timeline of the trace, or of given segments, in any order and also repeated."""
        events = [event for segment in self.segments if segments is None for event in segment.events]
        if segments is not None:
            events = [event for segment in segments for event in segment.events]
        kinds = sorted({storage.kind for storage in self._storages})
        place = {kind: index for index, kind in enumerate(kinds)}
        return Timeline(
            kinds,
            np.array([place[self._storages[number].kind] for number, _ in events], dtype=np.int64),
            np.array([change for _, change in events], dtype=np.int64),
        )
