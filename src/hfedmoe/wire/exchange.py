"""Send messages to clients and take their replies as they come, each with a deadline."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from hfedmoe.wire.local import TOO_LATE, LocalGrid

MAX_REASON = 300

POLL_S, MOST_POLL_S = 0.05, 0.5
"""Seconds between two looks for replies of devices, after one came and after a while without."""
LOOK_S = 0.5
"""Seconds of uploads after which the server looks for replies: far less than any real deadline."""
GRACE_S = 5.0
"""Seconds that the server waits beyond a message's time to live, so that the carrier can report the failure first."""
HERE_S = 1.0
"""Seconds between two looks at who is connected: fewer than a device needs to start again."""
UNAVAILABLE = 5
"""Flower's code for a message to a node that gave no sign of life in time."""
LEFT, GONE = "left", "is no longer connected"

Sessions = Mapping[int, str]
"""What the carrier calls the time since when a node is connected, by node; another one after a restart."""


def clean(text: str) -> str:
    """A client's text, made safe to print: one short line of printable characters."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    return "".join(character for character in line.strip() if character.isprintable())[:MAX_REASON] or "no reason given"


class Pause:
    """Waits between looks for something that comes at any time: each is twice as long as the one before it.

    Args:
        least, most: seconds of the first wait, and of the longest.
    """

    def __init__(self, least: float, most: float) -> None:
        self._least = self._next = least
        self._most = most

    def wait(self) -> None:
        """Nothing came: wait, and longer the next time."""
        time.sleep(self._next)
        self._next = min(2 * self._next, self._most)

    def reset(self) -> None:
        """Something came: the next wait is short again."""
        self._next = self._least


@dataclass
class Request:
    """One message to one client."""

    node: int
    kind: str
    content: RecordDict


@dataclass
class Answer:
    """A reply, or why there is none: `status` is "ok", "late", "failed", or "left" (the client is not connected)."""

    node: int
    reply: Message | None
    status: str = "ok"
    reason: str = ""


def connected(grid: Grid) -> Sessions:
    """The nodes that are connected now."""
    if isinstance(grid, LocalGrid):
        return dict.fromkeys(grid.get_node_ids(), "")
    return {node.node_id: node.last_activated_at for node in grid.get_nodes()}


def exchange(
    grid: Grid, requests: Iterable[Request], group: str, timeout_s: float, here: Callable[[], Sessions] | None = None
) -> Iterator[Answer]:
    """Answers in the order in which they arrive; exactly one for every request.

    Only `LocalGrid.most_open` requests to simulated clients are open at a time: a payload is made when it is needed,
    and an update is folded in before further ones exist. Devices get all requests at once and work in parallel. The
    deadline of such a request begins when it is sent, so a slow upload to one costs the others no time.

    Args:
        here: tells who is connected now, so that nobody waits for a client that left; None: nobody leaves.
    """
    waiting = Waiting(grid, group, timeout_s, here)
    local = grid if isinstance(grid, LocalGrid) else None
    looked = time.monotonic()
    for request in requests:
        yield from waiting.send(request)
        del request  # its payload is delivered
        while local is not None and len(waiting) >= local.most_open:
            yield from waiting.replies()
        if local is None and time.monotonic() - looked >= LOOK_S:
            # Replies of earlier requests must not grow too old while others are sent.
            yield from waiting.replies()
            looked = time.monotonic()
    pause = Pause(POLL_S, MOST_POLL_S)
    while waiting:
        before = len(waiting)
        yield from waiting.replies()
        yield from waiting.given_up()
        if len(waiting) < before:
            pause.reset()
        elif local is None:
            pause.wait()


@dataclass(frozen=True)
class _Sent:
    """A request that has no answer yet."""

    node: int
    deadline: float
    """On the clock of `time.monotonic`."""
    session: str | None
    """Of its client when the request was sent; None: it was not connected."""


class Waiting:
    """Requests that have no answer yet; nothing here waits.

    Args:
        group: of all its messages, for Flower.
        timeout_s: seconds for each of them.
        here: as for `exchange`.
    """

    def __init__(self, grid: Grid, group: str, timeout_s: float, here: Callable[[], Sessions] | None = None) -> None:
        self._grid, self._group, self._timeout_s, self._here = grid, group, timeout_s, here
        self._sent: dict[str, _Sent] = {}
        self._sessions: Sessions = {}
        self._looked = -math.inf

    def __len__(self) -> int:
        return len(self._sent)

    def send(self, request: Request) -> Iterator[Answer]:
        """Send a request; the answer of a client that is not connected comes at once."""
        self._look()
        message = _message(self._grid, request, self._group, self._timeout_s)
        message_id = next(iter(self._grid.push_messages([message])), "")
        if not message_id:
            yield Answer(request.node, None, LEFT, GONE)
            return
        keeps_its_own = isinstance(self._grid, LocalGrid)
        deadline = math.inf if keeps_its_own else time.monotonic() + self._timeout_s + GRACE_S
        self._sent[message_id] = _Sent(request.node, deadline, self._sessions.get(request.node))

    def replies(self) -> Iterator[Answer]:
        """The answers that are there now, one by one, so that never more than one update is held."""
        for message_id in list(self._sent):
            yield from self._pull(message_id)

    def given_up(self) -> Iterator[Answer]:
        """Answers in the name of clients that left or are late."""
        now = time.monotonic()
        if self._look():
            for message_id, sent in list(self._sent.items()):
                # A client that came back in between has a new session, and does not know the request any more.
                if sent.session is None or self._sessions.get(sent.node) != sent.session:
                    yield from self._pull(message_id)  # it may have answered before it left
                    if self._sent.pop(message_id, None) is not None:
                        yield Answer(sent.node, None, LEFT, GONE)
        for message_id in [one for one, sent in self._sent.items() if now > sent.deadline]:
            yield Answer(self._sent.pop(message_id).node, None, "late", f"no reply within {self._timeout_s:g} s")

    def _look(self) -> bool:
        """Look who is connected, if that was not done a moment ago."""
        now = time.monotonic()
        if self._here is None or now - self._looked < HERE_S:
            return False
        self._looked, self._sessions = now, self._here()
        return True

    def _pull(self, message_id: str) -> Iterator[Answer]:
        for reply in self._grid.pull_messages([message_id]):
            sent = self._sent.pop(reply.metadata.reply_to_message_id, None)
            if sent is None:
                continue
            if not reply.has_error():
                yield Answer(sent.node, reply)
            elif reply.error.code == UNAVAILABLE:
                yield Answer(sent.node, None, LEFT, GONE)
            else:
                late = reply.error.code == TOO_LATE
                yield Answer(sent.node, None, "late" if late else "failed", clean(reply.error.reason or ""))


def _message(grid: Grid, request: Request, group: str, ttl: float) -> Message:
    if isinstance(grid, LocalGrid):
        return grid.create_message(request.content, request.kind, request.node, group, ttl)
    return Message(request.content, request.node, request.kind, ttl=ttl, group_id=group)
