"""The base tensors of the experts on this device, read from their source when needed.

Each expert is held by itself, not in a stack. So between rounds only the difference is read and dropped, and a forward
pass can stream over all experts with only a few of them in memory.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from hfedmoe.moe.experts.bank import Bank, Scratch, bank_of
from hfedmoe.moe.experts.quantised import Plain, Stored, store_as, stored_bytes
from hfedmoe.moe.experts.room import Joined

MATRICES = ("up", "down")


class ExpertSource(Protocol):
    """Where the base tensors of experts come from."""

    def shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of one expert of a layer, under the names of kernel.FULL."""
        ...

    def read(self, layer: int, expert: int) -> dict[str, Tensor]:
        """The tensors of one expert, in any precision, on any device."""
        ...


class ExpertStore:
    """Holds experts for the layers of one model.

    Args:
        source: where their tensors come from.
        num_experts: per MoE layer.
        expert_dtype: how they are held: "same" (as `dtype`), "float32", "bfloat16", "float16", "8bit" or "4bit".
        dtype: of the model.
        device: where they are held.
    """

    def __init__(
        self,
        source: ExpertSource,
        num_experts: list[int],
        expert_dtype: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.source, self.num_experts = source, num_experts
        self.expert_dtype, self.dtype, self.device = expert_dtype, dtype, device
        self.present: list[list[int]] = [[] for _ in num_experts]
        """Per layer, the experts that may be used, in ascending order."""
        self.reads = 0
        """Number of experts read from the source so far."""
        self._held: OrderedDict[tuple[int, int], dict[str, Stored]] = OrderedDict()
        self._banks: dict[tuple[int, str], Bank] = {}
        """Layers whose experts are in one piece of memory, by the name of the tensor."""
        self._scratch = Scratch()
        self._capacity: int | None = None

    def __len__(self) -> int:
        """Number of experts in memory."""
        return len(self._held)

    @property
    def nbytes(self) -> int:
        """Bytes of all experts in memory."""
        return sum(self.expert_bytes(layer) for layer, _ in self._held)

    def expert_bytes(self, layer: int) -> int:
        """Bytes that one expert of a layer takes, as it is held."""
        return sum(stored_bytes(shape, self.expert_dtype, self.dtype) for shape in self.source.shapes(layer).values())

    def reside(self, resident: list[Tensor]) -> None:
        """Hold exactly these experts (bool [E] per layer): drops the others, then reads those that are missing."""
        wanted = [keep.nonzero()[:, 0].tolist() for keep in resident]
        for layer, (old, new) in enumerate(zip(self.present, wanted, strict=True)):
            if old != new:
                self._break_up(layer, set(new))
        keys = {(layer, expert) for layer, experts in enumerate(wanted) for expert in experts}
        for key in [key for key in self._held if key not in keys]:
            del self._held[key]
        for key in sorted(keys - set(self._held)):
            self._held[key] = self._read(*key)
        self.present = wanted

    def clear(self) -> None:
        """Drop everything."""
        self._held.clear()
        self._banks.clear()
        self.present = [[] for _ in self.num_experts]

    def reside_stacked(self, resident: list[Tensor]) -> list[dict[str, Tensor]]:
        """As `reside`, with the experts of each layer in stacks [n, ...] of the model's dtype, for full training.

        Rows of a stack cannot be added or removed, so all experts are dropped first and read again.
        """
        self._held.clear()
        self._banks.clear()
        self.present = [keep.nonzero()[:, 0].tolist() for keep in resident]
        layers = []
        for layer, experts in enumerate(self.present):
            stacks = {
                name: torch.empty(len(experts), *shape, dtype=self.dtype, device=self.device)
                for name, shape in self.source.shapes(layer).items()
            }
            for place, expert in enumerate(experts):
                for name, tensor in self.source.read(layer, expert).items():
                    stacks[name][place].copy_(tensor)
                self._held[layer, expert] = {name: Plain(stack[place]) for name, stack in stacks.items()}
                self.reads += 1
            layers.append(stacks)
        return layers

    @contextmanager
    def streaming(self, capacity: int) -> Iterator[None]:
        """Every expert may be used; at most `capacity` are in memory, and the least recently used is dropped first.

        Afterwards the same experts as before are resident. Raises ValueError for a capacity below 1.
        """
        if capacity < 1:
            raise ValueError(f"cannot stream experts with room for {capacity}")
        for layer in range(len(self.present)):
            self._break_up(layer, set(self.present[layer]))
        before = self.present
        self._capacity = capacity
        self.present = [list(range(number)) for number in self.num_experts]
        try:
            yield
        except BaseException:
            self.clear()  # reading residents back could fail for the same reason
            raise
        finally:
            self._capacity = None
        self.present = before
        if any(before):
            self.reside([_mask(experts, n) for experts, n in zip(before, self.num_experts, strict=True)])

    def get(self, layer: int, expert: int) -> dict[str, Stored]:
        """The tensors of one expert; while streaming, it is read now if it is not in memory."""
        key = (layer, expert)
        if self._capacity is None:
            return self._held[key]
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        while len(self._held) >= self._capacity:
            self._held.popitem(last=False)
        self._held[key] = self._read(layer, expert)
        return self._held[key]

    def joined(self, layer: int, name: str, room: int, dtype: torch.dtype, transposed: bool) -> Joined | None:
        """The present experts' matrices `name` in one piece of memory with room for LoRA; None if they cannot be.

        They move there at the first call, and stay until other experts are present.
        """
        experts = self.present[layer]
        if self._capacity is not None or not experts:
            return None
        bank = self._banks.get((layer, name))
        if bank is None:
            bank = bank_of([self._held[layer, expert][name] for expert in experts], self._scratch)
            if bank is None:
                return None
            self._banks[layer, name] = bank
        found = bank.joined(room, dtype, transposed)
        if self._held[layer, experts[0]][name] is not bank.stored(0):  # they have moved
            for place, expert in enumerate(experts):
                self._held[layer, expert][name] = bank.stored(place)
        return found

    def _break_up(self, layer: int, keep: set[int]) -> None:
        """Hold the experts of a layer by themselves again, and only those to keep."""
        banks = {name: self._banks.pop((layer, name)) for name in MATRICES if (layer, name) in self._banks}
        for place, expert in enumerate(self.present[layer] if banks else ()):
            if expert in keep:
                self._held[layer, expert].update({name: bank.apart(place) for name, bank in banks.items()})
            else:
                del self._held[layer, expert]

    def _read(self, layer: int, expert: int) -> dict[str, Stored]:
        self.reads += 1
        read, held = self.source.read(layer, expert), {}
        while read:  # frees each read tensor as soon as it is stored
            name, tensor = read.popitem()
            held[name] = store_as(tensor.to(self.device), self.expert_dtype, self.dtype)
            del tensor
        return held


class HeldWeights:
    """One matrix per present expert of a layer, as the expert kernel needs it (see `base.Weights`)."""

    def __init__(self, store: ExpertStore, layer: int, name: str, transposed: bool) -> None:
        self._store, self._layer, self._name, self._transposed = store, layer, name, transposed
        shape = store.source.shapes(layer)[name]
        self.rows, self.columns = shape[::-1] if transposed else shape
        self.num_experts = len(store.present[layer])

    def __call__(self, expert: int, dtype: torch.dtype) -> Tensor:
        weight = self._store.get(self._layer, self._store.present[self._layer][expert])[self._name](dtype)
        return weight.t() if self._transposed else weight

    def joined(self, room: int, dtype: torch.dtype) -> Joined | None:
        """As `ExpertBase.joined`."""
        return self._store.joined(self._layer, self._name, room, dtype, self._transposed)


class HeldBiases(Sequence[Tensor]):
    """One bias per present expert of a layer."""

    def __init__(self, store: ExpertStore, layer: int, name: str) -> None:
        self._store, self._layer, self._name = store, layer, name

    def __len__(self) -> int:
        return len(self._store.present[self._layer])

    def __getitem__(self, expert: Any) -> Any:  # one index; the kernel uses no slices
        stored = self._store.get(self._layer, self._store.present[self._layer][expert])[self._name]
        return stored(self._store.dtype)


def _mask(experts: list[int], number: int) -> Tensor:
    mask = torch.zeros(number, dtype=torch.bool)
    mask[experts] = True
    return mask
