"""The federation's usage so far: what a client that has seen nothing yet starts its scores from."""

import torch
from torch import Tensor

from hfedmoe.runs import ExpertHistory


class UsageMean:
    """Mean usage u of every expert (eq. 16) over the clients of all rounds so far, each counting |D_c|.

    Added up in float64 and always in the order of rounds and clients, so that a resumed run has the same bits.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._weight = 0.0

    def add(self, usage: Tensor, examples: int) -> None:
        """Fold in one client's round: float32 [sum E_l], measured on `examples` rows."""
        part = usage.double() * examples
        self._sum = part if self._sum is None else self._sum + part
        self._weight += examples

    def add_rounds(self, history: ExpertHistory, examples: dict[tuple[int, int], int]) -> None:
        """Fold in what a run folder remembers; `examples` is |D_c| per (round, client) that took part."""
        exists = torch.arange(int(history.num_experts.max())) < torch.from_numpy(history.num_experts)[:, None]  # [L, E]
        for here, round in enumerate(history.rounds.tolist()):
            for column, client in enumerate(history.clients.tolist()):
                if (round, client) in examples:
                    usage = torch.from_numpy(history.usage[here, column])[exists]
                    self.add(usage, examples[round, client])

    def value(self) -> Tensor | None:
        """float32 [sum E_l]; None before anything was added."""
        return None if self._sum is None else (self._sum / self._weight).float()
