"""Who takes part: the clients as the server knows them, how they join, and who is asked in a round."""

import statistics
import time
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from flwr.serverapp import Grid
from torch import Tensor

from hfedmoe.config import RunConfig
from hfedmoe.config.federation import FederationConfig
from hfedmoe.errors import UserError
from hfedmoe.events import Watcher
from hfedmoe.seeds import generator
from hfedmoe.wire import checks
from hfedmoe.wire.exchange import POLL_S, Answer, Request, clean, exchange
from hfedmoe.wire.messages import DESCRIBE, Description, InvalidReplyError, describe_request, unpack_bits

WAIT_S = 0.5
"""Seconds between two looks at who is connected."""


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

    @property
    def resident(self) -> list[Tensor]:
        """bool [E] per layer."""
        return unpack_bits(self.resident_bits, self.about.num_experts)


@dataclass(frozen=True)
class Known:
    """A client that is known beforehand. What it says about its number and its name is ignored."""

    client: int
    name: str
    most: int | None = None
    """Most rows that it may count for; None: no limit of its own."""


class Roll(Protocol):
    """Who may take part, for a server that knows its clients by their keys."""

    def expected(self) -> list[str]:
        """The names of all of them."""

    def here(self, grid: Grid) -> dict[int, Known]:
        """Those that are connected, by node."""


def gather(
    grid: Grid,
    config: RunConfig,
    num_experts: list[int],
    terms: str,
    base: str,
    watcher: Watcher,
    roll: Roll | None = None,
) -> dict[int, Member]:
    """Wait until all clients are connected, or as long as allowed, and ask each who it is.

    Args:
        num_experts: per layer.
        terms: the run's task, for every device.
        base: digest of the base model that every client must have; empty: not asked.
        roll: who the clients are; None: they say it themselves.

    Returns:
        The members by client number, in ascending order.

    Raises:
        UserError: fewer than `federation.min_clients` said who they are in time.
    """
    settings = config.federation
    members: dict[int, Member] = {}
    known = None if roll is None else _known(grid, config, roll, watcher)
    nodes = _connected(grid, config) if known is None else sorted(known)
    requests = (Request(node, DESCRIBE, describe_request(terms)) for node in nodes)
    for answer in exchange(grid, requests, "describe", min(settings.timeout_s, settings.connect_timeout_s)):
        try:
            about = checks.description(reply_of(answer), num_experts, base)
        except InvalidReplyError as error:
            who, reason = f"a client on node {answer.node}", clean(str(error))
            if known is not None:
                who = known[answer.node].name
                watcher.cannot_join(who, reason)
            watcher.warning(f"{who} is left out: {reason}")
            continue
        most = None
        if known is not None:
            one = known[answer.node]
            about, most = replace(about, client=one.client, name=one.name), one.most
        if about.client >= config.clients.count:
            watcher.warning(f"a client says it is number {about.client} of {config.clients.count}; left out")
        elif about.client in members:
            watcher.warning(f"a second client says it is number {about.client}; it is left out")
        else:
            members[about.client] = Member(answer.node, about, 0, most=most)
    if len(members) < settings.min_clients:
        tight = "timeout_s" if settings.timeout_s < settings.connect_timeout_s else "connect_timeout_s"
        raise UserError(
            f"{len(members)} of {config.clients.count} clients connected and said who they are within "
            f"{getattr(settings, tight):g} s, fewer than federation.min_clients = {settings.min_clients}; "
            f"start more clients or raise federation.{tight}"
        )
    members = dict(sorted(members.items()))
    weigh(members, settings, watcher)
    return members


def sample(members: dict[int, Member], config: RunConfig, round: int) -> list[Member]:
    """The members who are asked in a round: `federation.clients_per_round` drawn by the seed, in ascending order."""
    wanted = config.federation.clients_per_round
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


def _connected(grid: Grid, config: RunConfig) -> list[int]:
    """The connected nodes, as soon as there are as many as clients or the time is up."""
    deadline = time.monotonic() + config.federation.connect_timeout_s
    while len(nodes := sorted(grid.get_node_ids())) < config.clients.count and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return nodes


def _known(grid: Grid, config: RunConfig, roll: Roll, watcher: Watcher) -> dict[int, Known]:
    """The connected clients, as soon as all that are expected are here or the time is up."""
    deadline = time.monotonic() + config.federation.connect_timeout_s
    said: list[str] | None = None
    while True:
        here, expected = roll.here(grid), roll.expected()
        names = {one.name for one in here.values()}
        missing = [name for name in expected if name not in names]
        if missing != said:
            waiting = f", waiting for {', '.join(missing)}" if missing else ""
            watcher.phase(f"{len(expected) - len(missing)} of {len(expected)} here{waiting}")
            said = missing
        if not missing or time.monotonic() >= deadline:
            return here
        time.sleep(WAIT_S)


def weigh(members: dict[int, Member], settings: FederationConfig, watcher: Watcher) -> None:
    """Give every member its position and its weight |D_c|, which is bounded by the median client's.

    Decision: of an even number the lower of the two in the middle: more than half of the clients would have to lie.
    """
    told = {client: _bounded(member) for client, member in members.items()}
    most = settings.max_weight * statistics.median_low(told.values())
    for position, (client, member) in enumerate(members.items()):
        member.position, member.weight = position, min(told[client], round(most))
        if member.weight < member.about.examples:
            limit = "federation.max_weight" if member.weight < told[client] else "the roster's limit"
            watcher.warning(
                f"{member.about.name} says that it has {member.about.examples} rows; it counts as {member.weight} "
                f"({limit})"
            )


def _bounded(member: Member) -> int:
    return member.about.examples if member.most is None else min(member.about.examples, member.most)
