"""Experts made of all their copies of a round at once, for methods that compare the copies with each other."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Rule = Callable[[Tensor, Tensor], Tensor]
"""(changes [C, N], weights [C]) -> the change of the expert [N]."""


class StacksCombined:
    """As `averaging.StacksAverage`, with a rule that sees all copies of an expert: every update is kept until the end.

    Args:
        stretches: (first expert, number of experts) of every stack by name; experts are numbered over all layers.
        rule: one expert's tensors are flattened and joined to N numbers, in the order of their sorted names.
    """

    def __init__(self, stretches: Mapping[str, tuple[int, int]], rule: Rule) -> None:
        self._stretches, self._rule = dict(stretches), rule
        self._kept: list[tuple[dict[str, Tensor], list[int], Tensor]] = []

    def add(self, stacks: Mapping[str, Tensor], index: Tensor, weight: Tensor, checked: bool = False) -> None:
        """Keep one client's rows.

        Args:
            stacks: rows of each stack for the experts of `index` in its stretch, in their order.
            index: int64 [S], ascending, the experts that were sent.
            weight: float32 [S].
        """
        self._kept.append((dict(stacks), index.tolist(), weight.float()))

    def merge(self, other: "StacksCombined") -> None:
        """Keep all clients of another one too."""
        self._kept += other._kept

    def result(self, previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The new stacks; an expert without a copy of positive weight keeps its value bit for bit."""
        new = {name: tensor.clone() for name, tensor in previous.items()}
        layers: dict[tuple[int, int], list[str]] = {}
        for name, stretch in sorted(self._stretches.items()):  # a resumed run may have them in another order
            layers.setdefault(stretch, []).append(name)
        for (first, number), names in layers.items():
            places = [self._places(index, first, number) for _, index, _ in self._kept]
            for expert in range(number):
                copies = [
                    (torch.cat([stacks[name][place[0]].reshape(-1).float() for name in names]), weight[place[1]])
                    for (stacks, _, weight), found in zip(self._kept, places, strict=True)
                    if (place := found.get(expert)) is not None and weight[place[1]] > 0
                ]
                if not copies:
                    continue
                before = torch.cat([previous[name][expert].reshape(-1).float() for name in names])
                changes = torch.stack([copy for copy, _ in copies]) - before
                after = before + self._rule(changes, torch.stack([weight for _, weight in copies]))
                sizes = [previous[name][expert].numel() for name in names]
                for name, part in zip(names, after.split(sizes), strict=True):
                    new[name][expert] = part.view(previous[name][expert].shape).to(new[name])
        return new

    @staticmethod
    def _places(index: list[int], first: int, number: int) -> dict[int, tuple[int, int]]:
        """Of each sent expert of a layer: its row in the layer's stacks, and its place in `index`."""
        own = [(expert - first, at) for at, expert in enumerate(index) if first <= expert < first + number]
        return {expert: (row, at) for row, (expert, at) in enumerate(own)}
