"""Trained tensors that a client keeps from round to round, with the rows of those experts that it has had."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hfedmoe.moe.payload import kind_of, layer_of

BITS = "experts"


@dataclass
class Memory:
    """Tensors by the names under which they would be sent; of `experts.*` the rows of some experts, in order."""

    tensors: dict[str, Tensor]
    experts: list[Tensor]
    """bool [E] per layer."""

    def over(self, tensors: dict[str, Tensor], resident: list[Tensor]) -> dict[str, Tensor]:
        """`tensors` (with the rows of `resident` experts), with what is remembered in its place."""
        merged = {}
        for name, tensor in tensors.items():
            own = self.tensors.get(name)
            if own is None:
                merged[name] = tensor
            elif kind_of(name) != "experts":
                merged[name] = own
            else:
                known, wanted = self.experts[layer_of(name)], resident[layer_of(name)]
                merged[name] = tensor.clone()
                merged[name][(known & wanted)[wanted]] = own[(known & wanted)[known]].to(tensor)
        return merged

    def updated(self, tensors: dict[str, Tensor], resident: list[Tensor]) -> "Memory":
        """With these tensors (rows of `resident` experts) in place of what was remembered of them."""
        merged = {}
        for name, tensor in tensors.items():
            own = self.tensors.get(name)
            if own is None or kind_of(name) != "experts":
                # contiguous, as it must be to be saved: a B is stored as its transpose
                merged[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                continue
            known, new = self.experts[layer_of(name)], resident[layer_of(name)]
            both = known | new
            rows = tensor.new_empty(int(both.sum()), *tensor.shape[1:], device="cpu")
            rows[known[both]] = own
            rows[new[both]] = tensor.cpu()
            merged[name] = rows
        return Memory(merged, [known | new for known, new in zip(self.experts, resident, strict=True)])

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        """As flat tensors with names that begin with `prefix`."""
        named = {f"{prefix}{name}": tensor for name, tensor in self.tensors.items()}
        return named | {f"{prefix}{BITS}": torch.cat(self.experts).to(torch.uint8)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], prefix: str, num_experts: list[int]) -> "Memory":
        """The inverse of `to_tensors`; nothing where there is none."""
        found = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        bits = found.pop(BITS, None)
        if bits is None:
            return cls.nothing(num_experts)
        return cls({name: tensor.clone() for name, tensor in found.items()}, list(bits.bool().split(num_experts)))

    @classmethod
    def nothing(cls, num_experts: list[int]) -> "Memory":
        """Of a client that keeps nothing."""
        return cls({}, [torch.zeros(number, dtype=torch.bool) for number in num_experts])
