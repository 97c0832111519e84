"""What a client remembers between rounds: its running scores, and where it is in its data."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hfedmoe.method.scores import RunningScore


@dataclass
class ClientHistory:
    """One client's memory. It stays on the device and is saved with the run's checkpoints."""

    scores: list[RunningScore]
    """Per layer, the running mean of the configured score over all batches so far."""
    prior: list[Tensor] | None = None
    """Per layer [E], what the bootstrap suggests as long as nothing is observed."""
    examples_seen: int = 0
    rounds: int = 0

    @classmethod
    def new(cls, num_experts: list[int]) -> "ClientHistory":
        return cls([RunningScore(number) for number in num_experts])

    @property
    def observed(self) -> bool:
        """Whether any batch was scored yet."""
        return any(bool(score.state()["weight"].any()) for score in self.scores)

    def contribution(self) -> list[Tensor]:
        """Per layer [E], the scores that residency is chosen by."""
        if self.prior is not None and not self.observed:
            return self.prior
        return [score.value().cpu() for score in self.scores]

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything as a few flat tensors, which `from_tensors` reads back bit for bit."""
        states = [score.state() for score in self.scores]
        tensors = {
            "mean": torch.cat([state["mean"].cpu() for state in states]),
            "weight": torch.cat([state["weight"].cpu() for state in states]),
            "counters": torch.tensor([self.examples_seen, self.rounds]),
        }
        if self.prior is not None:
            tensors["prior"] = torch.cat(self.prior)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], num_experts: list[int]) -> "ClientHistory":
        """The inverse of `to_tensors`. Raises ValueError if the tensors belong to another model."""
        if tensors["mean"].shape != (sum(num_experts),):
            raise ValueError(f"history of {len(tensors['mean'])} experts, but the model has {sum(num_experts)}")
        means, weights = tensors["mean"].split(num_experts), tensors["weight"].split(num_experts)
        scores = [
            RunningScore.from_state({"mean": mean.clone(), "weight": weight.clone()})
            for mean, weight in zip(means, weights, strict=True)
        ]
        prior = [part.clone() for part in tensors["prior"].split(num_experts)] if "prior" in tensors else None
        seen, rounds = tensors["counters"].tolist()
        return cls(scores, prior, seen, rounds)
