"""Who is here: the clients are gathered at the start of a run, and looked for again before every round.

Decisions:

* A run waits at its start until all clients are connected, at most `federation.connect_timeout_s`. It begins with those
  who are here, if they are at least `federation.min_clients`. A server that was stopped and started again also waits
  for a sign of life from each: the carrier believes that those of before are still there, and drops them soon after.
* Later nobody waits for one client. Who connects is asked who it is, and takes part from the next round after it has
  answered, also if it takes long to open its model. Who is no longer connected is not asked.
* Who is late, fails or sends something invalid is asked again who it is, and takes part again when it has answered.
* Only a round with fewer than `federation.min_clients` waits, at most `federation.connect_timeout_s`.

Clients of this process are always there.
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

from flwr.serverapp import Grid

from hfedmoe.config import RunConfig
from hfedmoe.errors import UserError
from hfedmoe.events import Participant, Watcher
from hfedmoe.server.members import Known, Member, Roll, reply_of, weigh
from hfedmoe.wire import checks
from hfedmoe.wire.exchange import LEFT, POLL_S, Answer, Request, Sessions, Waiting, clean, connected, exchange
from hfedmoe.wire.local import LocalGrid
from hfedmoe.wire.messages import DESCRIBE, InvalidReplyError, describe_request
from hfedmoe.wire.same import Digests

WAIT_S = 0.5
"""Seconds between two looks at who is connected."""
AGAIN_S = 30.0
"""Seconds after which a client that cannot take part is asked again: its owner may have put it right."""


class Attendance:
    """The clients of a run that take part now.

    Args:
        num_experts: per layer.
        terms: the run's task, for every device.
        digests: of the base model and tokenizer that every client must have.
        roll: who the clients are; None: they say it themselves.
    """

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        num_experts: list[int],
        terms: str,
        digests: Digests,
        watcher: Watcher,
        roll: Roll | None = None,
    ) -> None:
        self._grid, self._config, self._num_experts = grid, config, num_experts
        self._terms, self._digests, self._watcher, self._roll = terms, digests, watcher, roll
        self._in_process = isinstance(grid, LocalGrid)
        self.members: dict[int, Member] = {}
        """By client number, in ascending order."""
        self._known: dict[int, Known] = {}
        self._sessions: Sessions = {}
        self._positions: dict[int, int] = {}
        """Of all clients that took part so far, as `events.Watcher` counts them."""
        self._asked: dict[int, tuple[str, float]] = {}
        """Of nodes that were asked who they are and take no part: the session, and when to ask again."""
        self._reasons: dict[int, str] = {}
        """Of nodes that cannot take part, as it was said."""
        settings = config.federation
        self._timeout_s = min(settings.timeout_s, settings.connect_timeout_s)
        self._watch = None if self._in_process else self._here
        self._waiting = Waiting(grid, "describe", self._timeout_s, self._watch)

    def gather(self) -> None:
        """Wait until all clients are connected, or as long as allowed, and ask each who it is.

        Raises:
            UserError: fewer than `federation.min_clients` said who they are in time.
        """
        self._connect()
        requests = (self._request(node) for node in sorted(self._sessions))
        for answer in exchange(self._grid, requests, "describe", self._timeout_s, self._watch):
            self._take(answer)
        settings = self._config.federation
        if len(self.members) < settings.min_clients:
            tight = "timeout_s" if settings.timeout_s < settings.connect_timeout_s else "connect_timeout_s"
            raise UserError(
                f"{len(self.members)} of {self._config.clients.count} clients connected and said who they are within "
                f"{getattr(settings, tight):g} s, fewer than federation.min_clients = {settings.min_clients}; "
                f"start more clients or raise federation.{tight}"
            )
        self._settle()

    def look(self) -> None:
        """See who came and went since the last round.

        Raises:
            UserError: fewer than `federation.min_clients` are here, and do not come in time.
        """
        if self._in_process:
            return
        settings = self._config.federation
        deadline = time.monotonic() + settings.connect_timeout_s
        said: int | None = None
        while True:
            self._once()
            here = len(self.members)
            if here >= settings.min_clients:
                return
            if here != said:
                said = here
                self._watcher.phase(f"waiting: {here} clients here, federation.min_clients = {settings.min_clients}")
            if time.monotonic() >= deadline:
                raise UserError(
                    f"{here} clients are here after {settings.connect_timeout_s:g} s, fewer than "
                    f"federation.min_clients = {settings.min_clients}; start more clients, or raise "
                    "federation.connect_timeout_s"
                )
            time.sleep(WAIT_S)

    def _here(self) -> Sessions:
        """The nodes that are connected now and may take part."""
        sessions = connected(self._grid)
        if self._roll is None:
            return sessions
        # Somebody may come between the two looks; only who was there both times counts.
        self._known = {node: one for node, one in self._roll.here(self._grid).items() if node in sessions}
        return {node: session for node, session in sessions.items() if node in self._known}

    def waiting(self, group: str) -> Waiting:
        """Requests to members that may outlive a round (`wire.exchange.Waiting`)."""
        return Waiting(self._grid, group, self._config.federation.timeout_s, self._watch)

    @property
    def most_open(self) -> int | None:
        """Requests that may be open at a time, where clients are simulated; None: all at once."""
        return self._grid.most_open if isinstance(self._grid, LocalGrid) else None

    def ask(self, requests: Iterable[Request], group: str) -> Iterator[Answer]:
        """The answers of members to requests of a round (`wire.exchange.exchange`)."""
        return exchange(self._grid, requests, group, self._config.federation.timeout_s, self._watch)

    def lost(self, member: Member, status: str) -> None:
        """A member has no valid answer in a round: it left, or must say again who it is."""
        client = member.about.client
        if self._in_process or self.members.get(client) is not member:
            return
        del self.members[client]
        if status == LEFT:
            self._watcher.left(member.position)

    def _once(self) -> None:
        self._sessions = self._here()
        for member in list(self.members.values()):
            if self._sessions.get(member.node) != member.session:
                self.lost(member, LEFT)
        taking_part = {member.node for member in self.members.values()}
        now = time.monotonic()
        for node, session in sorted(self._sessions.items()):
            before, again = self._asked.get(node, ("", 0.0))
            if node not in taking_part and (session != before or now >= again):
                self._asked[node] = session, math.inf
                for answer in self._waiting.send(self._request(node)):
                    self._take(answer)
        for answers in (self._waiting.replies(), self._waiting.given_up()):
            for answer in answers:
                self._take(answer)
        self._settle()

    def _request(self, node: int) -> Request:
        return Request(node, DESCRIBE, describe_request(self._terms, self._digests))

    def _take(self, answer: Answer) -> None:
        """Who a client is, or why it takes no part."""
        node = answer.node
        self._asked[node] = self._sessions.get(node, ""), time.monotonic() + AGAIN_S
        try:
            about = checks.description(reply_of(answer), self._num_experts, self._digests)
        except InvalidReplyError as error:
            if answer.status != LEFT:
                self._cannot_join(node, clean(str(error)))
            return
        most = None
        if self._roll is not None:
            one = self._known.get(node)
            if one is None:
                return  # it was taken off the roll meanwhile
            about, most = replace(about, client=one.client, name=one.name), one.most
        elif about.client >= self._config.clients.count:
            count = self._config.clients.count
            self._leave_out(node, f"a client says it is number {about.client} of {count}; left out")
            return
        if about.client in self.members:
            if self.members[about.client].node == node:
                return  # it was asked twice
            self._leave_out(node, f"a second client says it is number {about.client}; it is left out")
            return
        self._reasons.pop(node, None)
        self._asked.pop(node, None)
        self.members[about.client] = Member(node, about, -1, most=most, session=self._sessions.get(node, ""))

    def _cannot_join(self, node: int, reason: str) -> None:
        known = self._known.get(node)
        who = f"a client on node {node}" if known is None else known.name
        if self._leave_out(node, f"{who} is left out: {reason}") and known is not None:
            self._watcher.cannot_join(who, reason)

    def _leave_out(self, node: int, text: str) -> bool:
        """Say why a client takes no part, unless that was said; returns whether it is said now."""
        new = self._reasons.get(node) != text
        if new:
            self._reasons[node] = text
            self._watcher.warning(text)
        return new

    def _settle(self) -> None:
        """Order and weigh the members, and say who is new."""
        before = set(self._positions)
        new = [member for member in self.members.values() if member.position < 0]
        self.members = dict(sorted(self.members.items()))
        for client, member in self.members.items():
            member.position = self._positions.setdefault(client, len(self._positions))
        if self.members:
            weigh(self.members, self._config.federation, self._watcher)
        for member in new if before else ():
            self._watcher.joined(member.position, self._participant(member), member.about.client in before)

    def participants(self) -> dict[int, Participant]:
        """The members by client number; at the start of a run this is the order of their positions."""
        return {client: self._participant(member) for client, member in self.members.items()}

    def _participant(self, member: Member) -> Participant:
        about = member.about
        return Participant(about.name, about.examples, about.budget, about.budget / sum(self._num_experts))

    def _connect(self) -> None:
        """Wait for all clients, at most as long as allowed."""
        deadline = time.monotonic() + self._config.federation.connect_timeout_s
        said: list[str] | None = None
        while True:
            self._sessions = self._here()
            if self._roll is None:
                missing = len(self._sessions) < self._config.clients.count
            else:
                names = {one.name for one in self._known.values() if not one.overdue}
                absent = [name for name in self._roll.expected() if name not in names]
                missing = bool(absent)
                if absent != said:
                    said, number = absent, len(self._roll.expected())
                    waiting = f", waiting for {', '.join(absent)}" if absent else ""
                    self._watcher.phase(f"{number - len(absent)} of {number} here{waiting}")
            if not missing or time.monotonic() >= deadline:
                return
            time.sleep(POLL_S if self._roll is None else WAIT_S)
