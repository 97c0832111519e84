"""What a client remembers between rounds: its running scores, its position in its data, and its limits."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hfedmoe.client.kept import Memory
from hfedmoe.client.regrowth import Regrowth
from hfedmoe.device.pace import StepTimes
from hfedmoe.method.running import RunningScore

MEMORIES = ("private", "began", "ended")


@dataclass
class ClientHistory:
    """One client's memory. It stays on the device and is saved with the run's checkpoints."""

    scores: list[RunningScore]
    """Per layer, the running mean of the configured score over all batches so far."""
    prior: list[Tensor] | None = None
    """Per layer [E], scores from the bootstrap, used until a batch is scored."""
    examples_seen: int = 0
    rounds: int = 0
    step_times: StepTimes = field(default_factory=StepTimes)
    """How long steps took; only with a deadline."""
    private: Memory | None = None
    """Trained tensors of its own, for methods that leave some on the client."""
    began: Memory | None = None
    ended: Memory | None = None
    """What its last rounds began and ended with, for methods that keep something back."""
    federation: list[Tensor] | None = None
    """Per layer [E], the federation's usage as the server last told it."""
    usage: list[Tensor] | None = None
    """Per layer [E], the client's own usage in its last round, for methods that merge experts."""
    limit: int | None = None
    """Most experts over all layers that it holds after running out of memory; 0: even the fewest did not fit."""
    regrowth: Regrowth = field(default_factory=Regrowth)
    """When that limit grows again."""

    @classmethod
    def new(cls, num_experts: list[int]) -> "ClientHistory":
        """The history of a new client; `num_experts` is E_l of every layer."""
        return cls([RunningScore(number) for number in num_experts])

    @property
    def observed(self) -> bool:
        """Whether any batch was scored yet."""
        return any(bool(score.state()["weight"].any()) for score in self.scores)

    def contribution(self) -> list[Tensor]:
        """Per layer [E], the scores that decide which experts are resident."""
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
        if self.step_times.measured:
            tensors["step_times"] = torch.tensor(self.step_times.sums, dtype=torch.float64)
        if self.limit is not None:
            again = self.regrowth
            tensors["limit"] = torch.tensor([self.limit, again.good, again.patience, again.grew])
        if self.federation is not None:
            tensors["federation"] = torch.cat(self.federation)
        if self.usage is not None:
            tensors["usage"] = torch.cat(self.usage)
        for name in MEMORIES:
            memory = getattr(self, name)
            tensors |= {} if memory is None else memory.to_tensors(f"{name}/")
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
        times = StepTimes(tensors["step_times"].tolist()) if "step_times" in tensors else StepTimes()
        limit, again = None, Regrowth()
        if "limit" in tensors:
            limit, good, patience, grew = tensors["limit"].tolist()
            again = Regrowth(good, patience, bool(grew))
        memories = {
            name: Memory.from_tensors(tensors, f"{name}/", num_experts)
            for name in MEMORIES
            if any(key.startswith(f"{name}/") for key in tensors)
        }
        told = [part.clone() for part in tensors["federation"].split(num_experts)] if "federation" in tensors else None
        usage = [part.clone() for part in tensors["usage"].split(num_experts)] if "usage" in tensors else None
        return cls(
            scores,
            prior,
            seen,
            rounds,
            times,
            limit=limit,
            regrowth=again,
            federation=told,
            usage=usage,
            **memories,
        )
