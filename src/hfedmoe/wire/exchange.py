"""Send messages to clients and take their replies as they come, each with a deadline."""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from hfedmoe.wire.local import TOO_LATE, LocalGrid

MAX_REASON = 300

POLL_S = 0.05
LOOK_S = 0.5
"""Seconds of uploads after which the server looks for replies: far less than any real deadline."""
GRACE_S = 5.0
"""Seconds that the server waits beyond a message's time to live, so that the carrier can report the failure first."""


def clean(text: str) -> str:
    """A client's text, made safe to print: one short line of printable characters."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    return "".join(character for character in line.strip() if character.isprintable())[:MAX_REASON] or "no reason given"


@dataclass
class Request:
    """One message to one client."""

    node: int
    kind: str
    content: RecordDict


@dataclass
class Answer:
    """A reply, or why there is none: `status` is "ok", "late" or "failed"."""

    node: int
    reply: Message | None
    status: str = "ok"
    reason: str = ""


def exchange(grid: Grid, requests: Iterable[Request], group: str, timeout_s: float) -> Iterator[Answer]:
    """Answers in the order in which they arrive; exactly one for every request.

    Only `LocalGrid.most_open` requests to simulated clients are open at a time: a payload is made when it is needed,
    and an update is folded in before further ones exist. Devices get all requests at once and work in parallel. The
    deadline of such a request begins when it is sent, so a slow upload to one costs the others no time.
    """
    waiting: dict[str, _Waiting] = {}
    local = grid if isinstance(grid, LocalGrid) else None
    looked = time.monotonic()
    for request in requests:
        message_id = next(iter(grid.push_messages([_message(grid, request, group, timeout_s)])), "")
        if not message_id:
            yield Answer(request.node, None, "failed", "the client is no longer connected")
            continue
        deadline = math.inf if local is not None else time.monotonic() + timeout_s + GRACE_S  # it keeps its own
        waiting[message_id] = _Waiting(request.node, deadline)
        del request  # its payload is delivered
        while local is not None and len(waiting) >= local.most_open:
            yield from _sweep(grid, waiting)
        if local is None and time.monotonic() - looked >= LOOK_S:
            # Replies of earlier requests must not grow too old while others are sent.
            yield from _sweep(grid, waiting)
            looked = time.monotonic()
    while waiting:
        before = len(waiting)
        yield from _sweep(grid, waiting)
        now = time.monotonic()
        for message_id in [one for one, request in waiting.items() if now > request.deadline]:
            yield Answer(waiting.pop(message_id).node, None, "late", f"no reply within {timeout_s:g} s")
        if local is None and waiting and len(waiting) == before:
            time.sleep(POLL_S)


@dataclass(frozen=True)
class _Waiting:
    """A request that has no answer yet."""

    node: int
    deadline: float
    """On the clock of `time.monotonic`."""


def _sweep(grid: Grid, waiting: dict[str, _Waiting]) -> Iterator[Answer]:
    """The answers that are there now, one by one, so that never more than one update is held."""
    for message_id in list(waiting):
        for reply in grid.pull_messages([message_id]):
            request = waiting.pop(reply.metadata.reply_to_message_id, None)
            if request is None:
                continue
            if reply.has_error():
                late = reply.error.code == TOO_LATE
                yield Answer(request.node, None, "late" if late else "failed", clean(reply.error.reason or ""))
            else:
                yield Answer(request.node, reply)


def _message(grid: Grid, request: Request, group: str, ttl: float) -> Message:
    if isinstance(grid, LocalGrid):
        return grid.create_message(request.content, request.kind, request.node, group, ttl)
    return Message(request.content, request.node, request.kind, ttl=ttl, group_id=group)
