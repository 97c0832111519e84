"""The clients as the server knows them, what each counts for, and who is asked in a round."""

import statistics
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from flwr.serverapp import Grid
from torch import Tensor

from hfedmoe.config import RunConfig
from hfedmoe.config.federation import FederationConfig
from hfedmoe.events import Watcher
from hfedmoe.seeds import generator
from hfedmoe.wire import checks
from hfedmoe.wire.exchange import Answer
from hfedmoe.wire.messages import Description, InvalidReplyError, Plan, pack_bits, unpack_bits


@dataclass(slots=True)
class Member:
    """A client as the server knows it."""

    node: int
    about: Description
    position: int
    weight: int = 0
    """|D_c| as it counts: what the client told, within `federation.max_weight` of the median client."""
    most: int | None = None
    """Most rows that it may count for, whatever it tells; None: only `federation.max_weight` limits it."""
    resident_bits: bytes = b""
    """What it planned to hold in this round; a few bytes, because there may be many thousands of members."""
    session: str = ""
    """Of its node when it said who it is (`wire.exchange.Sessions`)."""
    planned: "tuple[int, bytes | Tensor] | None" = None
    """For a round, what came with its last update: bits of what it will hold, or its scores float32 [sum E_l]."""

    @property
    def resident(self) -> list[Tensor]:
        """bool [E] per layer."""
        return unpack_bits(self.resident_bits, self.about.num_experts)

    @property
    def holds_all(self) -> bool:
        """Whether it planned to hold every expert: its sub-model is then the shared model."""
        return all(bool(keep.all()) for keep in self.resident)

    def plans(self, round: int, plan: Plan | None) -> None:
        """Keep what it said of a round; None: it said nothing."""
        if plan is None:
            self.planned = None
        elif plan.contribution is not None:
            self.planned = round, torch.cat(plan.contribution)
        elif plan.resident is not None:
            self.planned = round, pack_bits(plan.resident)

    def plan_of(self, round: int) -> Plan | None:
        """What it said of a round; None: it must be asked. Said once."""
        (of, said), self.planned = self.planned or (0, b""), None
        if of != round:
            return None
        if isinstance(said, Tensor):
            return Plan(contribution=list(said.split(self.about.num_experts)))
        return Plan(unpack_bits(said, self.about.num_experts))


@dataclass(frozen=True)
class Known:
    """A client that is known beforehand. What it says about its number and its name is ignored."""

    client: int
    name: str
    most: int | None = None
    """Most rows that it may count for; None: no limit of its own."""
    overdue: bool = False
    """Whether it has not given the sign of life that was due, so that it may be gone."""


class Roll(Protocol):
    """Who may take part, for a server that knows its clients by their keys."""

    def expected(self) -> list[str]:
        """The names of all of them."""

    def here(self, grid: Grid) -> dict[int, Known]:
        """Those that are connected, by node. A start waits for who is overdue."""


def sample(members: dict[int, Member], config: RunConfig, round: int, wanted: int | None) -> list[Member]:
    """The members who are asked in a round: so many of them (None: all) drawn by the seed, in ascending order."""
    everyone = list(members.values())
    if wanted is None or wanted >= len(everyone):
        return everyone
    order = torch.randperm(len(everyone), generator=generator(config.seed, "sample", round)).tolist()
    return [everyone[i] for i in sorted(order[:wanted])]


def reply_of(answer: Answer) -> Any:
    """The message of a reply. Raises InvalidReplyError with the reason where there is none or it reports trouble."""
    if answer.reply is None:
        raise InvalidReplyError(answer.reason)
    checks.trouble(answer.reply)
    return answer.reply


def weigh(members: dict[int, Member], settings: FederationConfig, watcher: Watcher) -> None:
    """Give every member its weight |D_c|, which is bounded by the median client's; said once for every new weight.

    Decision: of an even number the lower of the two in the middle: more than half of the clients would have to lie.
    """
    told = {client: _bounded(member) for client, member in members.items()}
    most = settings.max_weight * statistics.median_low(told.values())
    for client, member in members.items():
        before, member.weight = member.weight, min(told[client], round(most))
        if member.weight < member.about.examples and member.weight != before:
            limit = "federation.max_weight" if member.weight < told[client] else "the roster's limit"
            watcher.warning(
                f"{member.about.name} says that it has {member.about.examples} rows; it counts as {member.weight} "
                f"({limit})"
            )


def _bounded(member: Member) -> int:
    return member.about.examples if member.most is None else min(member.about.examples, member.most)
