"""Who takes part: the clients as the server knows them, how they join, and who is asked in a round."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from flwr.serverapp import Grid
from torch import Tensor

from hfedmoe.config import RunConfig
from hfedmoe.config.federation import FederationConfig
from hfedmoe.errors import UserError
from hfedmoe.events import Watcher
from hfedmoe.method.methods import METHODS
from hfedmoe.seeds import generator
from hfedmoe.wire import checks
from hfedmoe.wire.exchange import POLL_S, Answer, Request, clean, exchange
from hfedmoe.wire.messages import DESCRIBE, Description, InvalidReplyError, describe_request, unpack_bits


@dataclass(slots=True)
class Member:
    """A client as the server knows it."""

    node: int
    about: Description
    position: int
    weight: int = 0
    """|D_c| as it counts: what the client told, within `federation.max_weight` of the median client."""
    resident_bits: bytes = b""
    """What it planned to hold in this round; a few bytes, because there may be many thousands of members."""

    @property
    def resident(self) -> list[Tensor]:
        """bool [E] per layer."""
        return unpack_bits(self.resident_bits, self.about.num_experts)


def gather(
    grid: Grid, config: RunConfig, num_experts: list[int], terms: str, base: str, watcher: Watcher
) -> dict[int, Member]:
    """Wait until all clients are connected, or as long as allowed, and ask each who it is.

    Args:
        num_experts: per layer.
        terms: the run's task, for every device.
        base: digest of the base model that every client must have; empty: not asked.

    Returns:
        The members by client number, in ascending order.

    Raises:
        UserError: fewer than `federation.min_clients` said who they are in time.
    """
    settings = config.federation
    most_rank = None if METHODS[config.method.name].ranks is None else config.train.rank
    members: dict[int, Member] = {}
    requests = (Request(node, DESCRIBE, describe_request(terms)) for node in _connected(grid, config))
    for answer in exchange(grid, requests, "describe", min(settings.timeout_s, settings.connect_timeout_s)):
        try:
            about = checks.description(reply_of(answer), num_experts, base, most_rank)
        except InvalidReplyError as error:
            watcher.warning(f"a client on node {answer.node} is left out: {clean(str(error))}")
            continue
        if about.client >= config.clients.count:
            watcher.warning(f"a client says it is number {about.client} of {config.clients.count}; left out")
        elif about.client in members:
            watcher.warning(f"a second client says it is number {about.client}; it is left out")
        else:
            members[about.client] = Member(answer.node, about, 0)
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


def weigh(members: dict[int, Member], settings: FederationConfig, watcher: Watcher) -> None:
    """Give every member its position and its weight |D_c|, which is bounded by the median client's.

    Decision: of an even number the lower of the two in the middle: more than half of the clients would have to lie.
    """
    most = settings.max_weight * statistics.median_low(member.about.examples for member in members.values())
    for position, member in enumerate(members.values()):
        member.position, member.weight = position, min(member.about.examples, round(most))
        if member.weight < member.about.examples:
            watcher.warning(
                f"{member.about.name} says that it has {member.about.examples} rows; it counts as {member.weight} "
                "(federation.max_weight)"
            )
