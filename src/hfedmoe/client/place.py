"""What a client has room for, and which experts it holds. Neither needs its model."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hfedmoe.client.attempt import smaller
from hfedmoe.client.history import ClientHistory
from hfedmoe.config import RunConfig
from hfedmoe.config.budgets import in_experts
from hfedmoe.device.learned import Note
from hfedmoe.method.methods import METHODS
from hfedmoe.method.row import Method, Outlook
from hfedmoe.method.scores import SCORES, Score
from hfedmoe.seeds import generator
from hfedmoe.wire.trouble import OUT_OF_MEMORY, Trouble


@dataclass(frozen=True)
class Place:
    """What is known about a device without opening its model."""

    number: int
    name: str
    config: RunConfig
    num_experts: list[int]
    """E_l of every layer."""
    top_k: list[int]
    """Per layer."""
    budget_experts: int | None = None
    """The budget in experts over all layers if clients.budgets gives memory or a device; None if it gives experts."""
    streams: bool = False
    """Whether its first pass reads experts only when it needs them, because not all are in memory."""
    notes: Path | None = None
    """File in which a real device notes what it attempts. It shows later that the system killed the process."""

    @property
    def method(self) -> Method:
        """The method's entry in `METHODS`."""
        return METHODS[self.config.method.name]

    @property
    def score(self) -> Score | None:
        """The score that the method ranks experts by; None: it does not rank them."""
        name = self.method.score(self.config.method)
        return None if name is None else SCORES[name]

    @property
    def total(self) -> int:
        """All experts of the model."""
        return sum(self.num_experts)

    @property
    def budget(self) -> int:
        """Experts over all layers; all of them if the method ignores budgets."""
        if self.method.ignores_budgets(self.config.method):
            return self.total
        return self._room

    @property
    def told(self) -> int | None:
        """The budget that the server is told where it limits something else than the experts that a client holds."""
        return self._room if self.method.limits_otherwise else None

    @property
    def rank(self) -> int | None:
        """The rank of the LoRA pairs of its experts; None: the configured one."""
        return None if self.method.rank is None else self.method.rank(self.share, self.config.train.rank)

    @property
    def share(self) -> float:
        """The share of all experts that its budget has room for, also if the method ignores budgets."""
        return self._room / self.total

    @property
    def _room(self) -> int:
        if self.budget_experts is not None:
            return min(self.budget_experts, self.total)
        budgets = self.config.clients.budgets
        return in_experts(budgets[self.number % len(budgets)], self.total)

    @property
    def smallest(self) -> int:
        """The fewest experts over all layers that it can train with: top-k in every layer."""
        return max(self.top_k) * len(self.top_k)

    @property
    def at_least(self) -> list[int]:
        """Experts that it holds at least in every layer."""
        return self.method.at_least(self.top_k)

    @property
    def note(self) -> Note:
        """The note that the device keeps on its disk while it works."""
        work = (self.config.model, self.config.data, self.config.train, self.config.method)
        task = hashlib.sha256("".join(part.model_dump_json() for part in work).encode()).hexdigest()[:16]
        return Note(self.notes, task)

    def allowed(self, history: ClientHistory) -> int:
        """Experts over all layers that it may hold now.

        Decision: a limit that a client learned by running out of memory also applies with residency "all".
        """
        return self.budget if history.limit is None else min(self.budget, history.limit)

    def knows_its_scores(self, history: ClientHistory) -> bool:
        """Whether it can plan without a pass over its data."""
        if self.method.assign is None and self.allowed(history) >= self.total:
            return True
        drawn = self.score is None or self.score.drawn
        bootstrap = self.config.method.bootstrap
        begun = history.observed or history.prior is not None
        return drawn or begun or bootstrap == "none" or bootstrap == "prior"

    def plan(
        self,
        history: ClientHistory,
        round: int,
        usage: list[Tensor] | None,
        first_pass: Callable[[ClientHistory], None],
    ) -> list[Tensor]:
        """The experts to hold in this round, by the method's rule: bool [E] per layer, with `at_least`.

        Args:
            usage: the federation's usage so far, float32 [E] per layer, for a client without scores of its own.
            first_pass: gives the history its first scores; called only where `knows_its_scores` is False.

        Raises:
            CannotHoldError: the method requires more experts than the client has room for.
        """
        outlook = Outlook(
            num_experts=self.num_experts,
            top_k=self.top_k,
            budget=self.allowed(history),
            contribution=lambda: self.contribution(history, round, usage, first_pass),
            draws=generator(self.config.seed, "residency", self.number, round),
            progress=(round - 1) / max(1, self.config.federation.rounds - 1),
        )
        return self.method.hold(outlook, self.config.method)

    def contribution(
        self,
        history: ClientHistory,
        round: int,
        usage: list[Tensor] | None,
        first_pass: Callable[[ClientHistory], None],
    ) -> list[Tensor]:
        """The score of every expert for this client, [E] per layer; arguments as for `plan`."""
        method = self.config.method
        if self.score is None or self.score.drawn:
            return self.draw(round)
        if not history.observed:
            if method.bootstrap == "prior" and usage is not None:
                history.prior = usage
            elif history.prior is None:
                if method.bootstrap in ("prior", "none"):
                    return self.draw(round)
                first_pass(history)
        return history.contribution()

    def draw(self, round: int) -> list[Tensor]:
        """Random scores, [E] per layer."""
        draws = generator(self.config.seed, "residency", self.number, round)
        return [torch.rand(number, generator=draws) for number in self.num_experts]

    def learn(self, trouble: Trouble, history: ClientHistory, doing: str, held: int) -> Trouble:
        """Note in the history what to hold after a trouble; returns the trouble with this added to its reason.

        Args:
            doing: one of `device.learned.DOINGS`.
            held: experts that it held, or was going to hold.
        """
        if trouble.status != OUT_OF_MEMORY:
            return Trouble(trouble.status, f"{trouble.reason}; it trains fewer experts per step next round")
        if doing == "plan" and not self.streams and self.config.method.bootstrap == "forward":
            # Decision: this pass used all experts, so it shows nothing about the budget; it is not tried again.
            history.prior = self.draw(0)
            return Trouble(
                trouble.status,
                f"{trouble.reason}, in its first pass over all {self.total} experts; it starts with random experts "
                "next round (use a safetensors checkpoint, which can be read expert by expert)",
            )
        history.limit = smaller(held, self.smallest)
        history.regrowth.failed()
        then = f"it holds {history.limit} next round" if history.limit else self.cannot
        return Trouble(trouble.status, f"{trouble.reason}, with {held} experts; {then}")

    def trained(self, history: ClientHistory) -> None:
        """Note in the history that a round went well: a limit that it learned may grow."""
        limit = history.limit
        if limit is not None and 0 < limit < self.budget and history.regrowth.trained():
            history.limit = min(self.budget, limit + len(self.num_experts))

    @property
    def cannot(self) -> str:
        """The message for a device that has no room even for the fewest experts."""
        return (
            f"top-{max(self.top_k)} routing in {len(self.top_k)} layers needs {self.smallest} experts, so it cannot "
            "take part; use shorter texts, smaller batches or a smaller model.expert_dtype"
        )
