"""Means over batches, per expert, that can be saved and continued bit for bit."""

from typing import Self

import torch
from torch import Tensor


class RunningMean:
    """Mean per expert over batches. A value that is not finite means "not observed" and changes nothing."""

    def __init__(self, num_experts: int, device: torch.device | str | None = None) -> None:
        self._mean = torch.zeros(num_experts, dtype=torch.float32, device=device)
        self._weight = torch.zeros(num_experts, dtype=torch.float32, device=device)

    def update(self, values: Tensor, weight: float = 1.0) -> None:
        """Add one batch.

        Args:
            values: [E].
            weight: of the batch, for example its number of samples.

        Raises:
            ValueError: wrong shape, or a weight that is not positive.
        """
        if values.shape != self._mean.shape:
            raise ValueError(f"expected {len(self._mean)} values, one per expert, got {tuple(values.shape)}")
        if not 0 < weight < float("inf"):
            raise ValueError(f"weight={weight} is not a positive number")
        values = values.detach().to(self._mean)
        observed = values.isfinite()
        self._weight += observed * weight
        step = (values - self._mean) * (weight / self._weight)
        self._mean += torch.where(observed, step, 0.0)

    def value(self) -> Tensor:
        """float32 [E]; NaN for experts that were never observed."""
        return torch.where(self._weight > 0, self._mean, torch.nan)

    def state(self) -> dict[str, Tensor]:
        """What must be saved to continue bit for bit: `mean` and `weight`, float32 [E] each."""
        return {"mean": self._mean.clone(), "weight": self._weight.clone()}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        """The inverse of `state`. Raises ValueError if the state is not valid."""
        if set(state) != {"mean", "weight"} or state["mean"].dim() != 1 or state["mean"].shape != state["weight"].shape:
            raise ValueError("the state of a running mean is `mean` [E] and `weight` [E]")
        running = cls(len(state["mean"]), state["mean"].device)
        running._mean.copy_(state["mean"])
        running._weight.copy_(state["weight"])
        return running


class RunningScore(RunningMean):
    """A client's running mean of one score in one layer. Every expert has a value."""

    def value(self) -> Tensor:
        """float32 [E] without NaN.

        Decision: an expert that was never observed gets the mean of the observed ones (0 if there are none), so it is
        neither preferred nor ruled out. Equal scores are put in random order by `selection.select`.
        """
        observed = self._weight > 0
        total = torch.where(observed, self._mean, 0.0).sum()
        return torch.where(observed, self._mean, total / observed.sum().clamp_min(1))
