"""Experts of a client's own beside those of a layer, mixed by a gate of its own.

    y = (1 - g) MoE(x) + g own(x),    g = sigmoid(w x + b)

`own` is either a "copy": all experts of the layer with LoRA pairs of the client's own, routed as the layer's; or a
"graft": a copy of one expert of the layer, with a LoRA pair of its own, for every token. Until the client has begun
with it, y = MoE(x).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from hfedmoe.moe.experts.merged import Merged
from hfedmoe.moe.experts.trained import TrainedExperts

OwnKind = Literal["copy", "graft"]
OPEN = {"copy": 0.0, "graft": -2.0}
"""First value of b: a copy is what it copies, but a graft would change what the pretrained layer computes."""
NONE = -1.0


class OwnExperts:
    """One client's own experts in one layer.

    Args:
        kind: what they are.
        trained: LoRA pairs [E, ...] of a copy, or [1, ...] of a graft.
        device: of the layer.
    """

    def __init__(self, kind: OwnKind, trained: TrainedExperts, device: torch.device) -> None:
        self.kind, self.trained = kind, trained
        width = trained.stacks["up_a"].shape[-1]
        self.weight = torch.zeros(width, device=device, requires_grad=True)
        self.bias = torch.full((1,), OPEN[kind], device=device, requires_grad=True)
        self.expert = torch.full((1,), NONE)
        """[1], on the CPU: the expert that a graft copies; any from 0 on for a copy; below 0: not begun."""
        self._grafted: tuple[int, Merged] | None = None

    @property
    def begun(self) -> bool:
        """Whether the client has begun with it."""
        return float(self.expert) >= 0

    def tensors(self) -> dict[str, Tensor]:
        """Everything that makes it, by name: the live tensors."""
        own = {name: self.trained.stacks[name] for name in self.trained.travelling}
        return {"gate.weight": self.weight, "gate.bias": self.bias, "expert": self.expert} | own

    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return [self.weight, self.bias, *self.trained.parameters()]

    def mixed(self, theirs: Tensor, own: Tensor, hidden: Tensor) -> Tensor:
        """y [T, H] of the outputs of the layer and of its own experts, for the tokens hidden [T, H]."""
        gate = torch.sigmoid(hidden.float() @ self.weight + self.bias)[:, None].to(theirs.dtype)
        return theirs + gate * (own - theirs)

    def grafted(self, make: Callable[[int], Merged]) -> Merged:
        """The base weights of a graft; `make` makes them of an expert, if it is another than the last time."""
        expert = int(self.expert)
        if self._grafted is None or self._grafted[0] != expert:
            self._grafted = (expert, make(expert))
        return self._grafted[1]
