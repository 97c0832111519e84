"""One training step of each expert, from a client's own gradient; part of `python -m benchmarks.expert_scores`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hfedmoe.moe.model import MoEModel


class Steps:
    """One optimizer step of each expert, from the gradients that its trained tensors have now.

    Args:
        lr: of Adam.
        sgd: steps of plain gradient descent in place of Adam's. All experts together move as far as with Adam, but
            those with large gradients further than the others.
    """

    def __init__(self, model: MoEModel, lr: float, sgd: bool = False) -> None:
        self._leaves: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for layer, state in enumerate(model.states):
            assert state.trained is not None
            for expert in range(state.trained.num_experts):
                own = [state.trained.leaves[name][expert] for name in state.trained.travelling]
                self._leaves[layer, expert] = [(leaf, leaf.grad.clone()) for leaf in own if leaf.grad is not None]
        adam = {place: [(leaf, g / (g.abs() + 1e-8)) for leaf, g in own] for place, own in self._leaves.items()}
        if not sgd:
            self._leaves, self.lr = adam, lr
        else:
            self.lr = lr * float(_length(adam) / _length(self._leaves))

    @torch.no_grad()
    def take(self, places: Sequence[tuple[int, int]]) -> Callable[[], None]:
        """Take the steps of some (layer, expert); returns what undoes them, bit for bit."""
        moved = [(leaf, leaf.clone(), g) for place in places for leaf, g in self._leaves[place]]
        for leaf, _, g in moved:
            leaf.sub_(self.lr * g)

        def back() -> None:
            with torch.no_grad():
                for leaf, before, _ in moved:
                    leaf.copy_(before)

        return back


def _length(leaves: dict[tuple[int, int], list[tuple[Tensor, Tensor]]]) -> Tensor:
    return torch.stack([g.norm() for own in leaves.values() for _, g in own]).norm()
