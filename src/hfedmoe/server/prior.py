"""The federation's usage so far: what a client that has seen nothing yet starts its scores from."""

import numpy as np
import torch
from torch import Tensor


class UsageMean:
    """Mean usage u of every expert (eq. 16) over the clients of all rounds so far, each counting |D_c|.

    Added up in float64 and always in the order in which rounds and clients were written down, so that a resumed run
    has the same bits.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._weight = 0.0

    def add(self, usage: Tensor, examples: int) -> None:
        """Fold in one client's round: float32 [sum E_l], measured on `examples` rows."""
        part = usage.double() * examples
        self._sum = part if self._sum is None else self._sum + part
        self._weight += examples

    def add_round(self, rows: np.ndarray, examples: dict[int, int]) -> None:
        """Fold in a round as a run folder remembers it: rows of experts.npy, and |D_c| of those that took part."""
        for row in rows:
            client = int(row["client"])
            if client in examples:
                usage = torch.from_numpy(row["usage"].copy())
                self.add(usage[~usage.isnan()], examples[client])

    def value(self) -> Tensor | None:
        """float32 [sum E_l]; None before anything was added."""
        return None if self._sum is None else (self._sum / self._weight).float()
