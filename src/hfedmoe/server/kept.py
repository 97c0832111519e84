"""Count clients that keep an expert as the round began beside those that send a copy of it."""

from collections.abc import Mapping

import torch
from torch import Tensor


class KeptRows:
    """Weights of the rows (experts) that clients kept, and of those that they sent.

    Rows are numbered over all layers, as in `averaging.StacksAverage`.

    Args:
        stretches: the first row of each stack and its number of rows, by name.
    """

    def __init__(self, stretches: Mapping[str, tuple[int, int]]) -> None:
        self._stretches = dict(stretches)
        self._sent: Tensor | None = None
        self._kept: Tensor | None = None

    def add(self, sent: Tensor, kept: Tensor) -> None:
        """Add one client's weights, float32 [rows] each."""
        self._sent = sent.float() if self._sent is None else self._sent + sent
        self._kept = kept.float() if self._kept is None else self._kept + kept

    def merge(self, other: "KeptRows") -> None:
        """Add the weights of another one's clients."""
        if other._sent is not None and other._kept is not None:
            self.add(other._sent, other._kept)

    def mixed(self, before: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """before + share (mean - before) of every row, where share is the weight sent over all weight.

        Args:
            before: the stacks as the round began, [E, ...].
            means: the same over the clients that sent a copy. They are returned as they are if nobody kept a row.
        """
        if self._sent is None or self._kept is None:
            return dict(means)
        share = self._sent / (self._sent + self._kept).clamp_min(torch.finfo(torch.float32).tiny)
        new = {}
        for name, mean in means.items():
            first, number = self._stretches[name]
            own = share[first : first + number].to(mean).view(number, *[1] * (mean.dim() - 1))
            new[name] = torch.lerp(before[name], mean, own)
        return new
