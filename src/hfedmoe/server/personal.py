"""How good the model is for each client while the run goes on, on rows that it kept back.

Every `evaluation.personal_every` rounds the clients of the round get the model as it is now, and measure the experts
that they held. Where the server has the rows too, in a simulation, it measures the whole shared model on them.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

from hfedmoe.config import RunConfig
from hfedmoe.data.kept import MOST_CLIENTS
from hfedmoe.events import OwnScore, Personal, Watcher
from hfedmoe.server.attendance import Attendance
from hfedmoe.server.evaluation import Metrics
from hfedmoe.server.keeper import Keeper
from hfedmoe.server.members import Member, reply_of
from hfedmoe.server.records import RoundRecord
from hfedmoe.wire import checks
from hfedmoe.wire.exchange import Request, clean
from hfedmoe.wire.messages import PERSONAL, InvalidReplyError, wire_bytes

Shared = Callable[[int], Metrics]
"""A client's number -> the whole model that it gets, measured on the rows that it kept back."""


class Asks(Protocol):
    """The server, as far as it is needed here."""

    config: RunConfig
    keeper: Keeper
    watcher: Watcher
    shared: Shared | None
    untold: set[int]

    def request(self, member: Member, kind: str, round: int) -> Request: ...


def ask_clients(server: Asks, attendance: Attendance, log: RoundRecord) -> list[Personal]:
    """Let the clients of a round measure the model after it; those that say nothing are not asked again."""
    every = server.config.evaluation.personal_every
    if not every or log.round % every or server.config.clients.count > MOST_CLIENTS:
        return []
    server.watcher.phase("clients measure the model on their own rows")
    took_part = {done.client for done in log.clients() if done.status == "ok"} - server.untold
    asked = {member.node: member for client, member in attendance.members.items() if client in took_part}
    found = []
    for member, told in _answers(server, attendance, log, asked):
        if told.own_rows:
            found.append(_personal(server, member, told))
        else:
            server.untold.add(member.about.client)
    return sorted(found, key=lambda one: one.client)


def _answers(
    server: Asks, attendance: Attendance, log: RoundRecord, asked: dict[int, Member]
) -> Iterator[tuple[Member, OwnScore]]:
    """Ask clients, and count the bytes; who does not answer as it may is left out."""
    scores, most_rows = server.keeper.scores, server.config.evaluation.own_rows
    choices = bool(scores) and scores[0].accuracy is not None

    def requests() -> Iterator[Request]:
        for member in asked.values():
            request = server.request(member, PERSONAL, log.round)
            log.sent(member.about.client, wire_bytes(request.content))
            yield request

    for answer in attendance.ask(requests(), f"personal-{log.round}"):
        member = asked[answer.node]
        client = member.about.client
        try:
            reply = reply_of(answer)
            log.bytes_up[client] = log.bytes_up.get(client, 0) + wire_bytes(reply.content)
            yield member, checks.own_score(reply, most_rows, choices)
        except InvalidReplyError as error:
            text = f"{member.about.name} does not say how good the model is for it"
            server.watcher.warning(f"round {log.round}: {text}: {clean(str(error))}")


def _personal(server: Asks, member: Member, told: OwnScore) -> Personal:
    accuracy = None if told.right is None else told.right / told.own_rows
    shared: tuple[float | None, float | None] = (None, None)
    if server.shared is not None:
        metrics = server.shared(member.about.client)
        shared = metrics.accuracy, metrics.trained_loss
    elif member.holds_all:
        shared = accuracy, told.loss  # its sub-model is the whole model
    return Personal(
        client=member.about.client,
        name=member.about.name,
        own_rows=told.own_rows,
        accuracy=accuracy,
        loss=told.loss,
        shared_accuracy=shared[0],
        shared_loss=shared[1],
    )
