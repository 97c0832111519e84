"""The carrier with many clients at once: a Flower Grid whose clients work in the workers of Flower's Ray engine.

Replies are handed on in the order of the requests, whoever is ready first: sums of float32 numbers depend on their
order, and a run must end with the same bits every time. Until then they wait in Ray's store, not in the server.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from logging import getLogger
from typing import Any

from flwr.app import Message
from flwr.clientapp import ClientApp

from hfedmoe.wire.cluster import Cluster
from hfedmoe.wire.local import LocalGrid, failure, kept, lateness
from hfedmoe.wire.mailbox import Mailbox, Step, write_down

AHEAD = 2
"""Open messages for every worker: while the reply of a slow client is awaited, its fellows have something to do."""

log = getLogger(__name__)


@dataclass
class _Call:
    """A message that has no reply yet."""

    message: Message
    worker: Any = None
    result: Any = None
    """Ray's reference to what the worker returns; None: it is not with a worker."""
    deadline: float = 0.0
    """On the clock of `time.monotonic`."""
    late: bool = False
    done: bool = False


class WorkerGrid(LocalGrid):
    """Gives messages to workers.

    A client that takes longer than its message's time to live loses its worker, and so does one that crashes it: the
    reply is an error, and a new worker takes the place.

    Args:
        app_of: makes the clients' app in a worker; a function of a module, which gets the workers' mailbox.
        on_step: is told every step of a client.
    """

    def __init__(
        self,
        app_of: Callable[[Any], Callable[[], ClientApp]],
        num_clients: int,
        cluster: Cluster,
        on_step: Callable[[Step], None],
    ) -> None:
        super().__init__(num_clients)
        self.most_open = AHEAD * cluster.at_once
        self._cluster = cluster
        self._mailbox = cluster.beside(Mailbox)
        self._app_fn = app_of(self._mailbox)
        self._on_step = on_step
        self._idle = [cluster.worker() for _ in range(cluster.at_once)]
        self._open: dict[str, _Call] = {}
        """By message, in the order in which they were pushed."""
        self._queue: deque[_Call] = deque()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Give messages to idle workers; those that are too many wait."""
        ids = []
        for message in messages:
            call = _Call(message)
            self._open[message.metadata.message_id] = call
            self._queue.append(call)
            ids.append(message.metadata.message_id)
        self._start()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """The replies that are there, but none before that of an earlier message."""
        for message_id in list(message_ids):
            if message_id != next(iter(self._open), None):
                continue
            self._look()
            call = self._open[message_id]
            if call.done:
                del self._open[message_id]
                yield self._reply(call)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Deliver all messages and return their replies."""
        ids, replies = list(self.push_messages(messages)), []
        while len(replies) < len(ids):
            replies += list(self.pull_messages(ids[len(replies) :]))
            time.sleep(0.01)
        return replies

    def _start(self) -> None:
        while self._idle and self._queue:
            call = self._queue.popleft()
            message, call.worker = call.message, self._idle.pop()
            # A reply gets the rest of the request's time to live, and time in the queue must not count.
            message.metadata.created_at = time.time()
            call.deadline = time.monotonic() + message.metadata.ttl
            node = message.metadata.dst_node_id
            call.result = call.worker.run.remote(self._app_fn, message, str(node - 1), self.context(node))

    def _look(self) -> None:
        """Note who is ready or late, and what the workers say; give waiting messages to workers that are free."""
        import ray

        busy = [call for call in self._open.values() if call.result is not None and not call.done]
        ready, _ = ray.wait([call.result for call in busy], num_returns=len(busy), timeout=0) if busy else ([], [])
        here = set(ready)
        for call in busy:
            if call.result in here:
                call.done = True
                self._idle.append(call.worker)
            elif time.monotonic() > call.deadline:
                call.done = call.late = True
                self._replace(call.worker)
        self._start()
        self._listen()

    def _replace(self, worker: Any) -> None:
        import ray

        ray.kill(worker)
        self._idle = [idle for idle in self._idle if idle is not worker] + [self._cluster.worker()]

    def _listen(self) -> None:
        import ray

        try:
            said = ray.get(self._mailbox.take.remote())
        except ray.exceptions.RayError:  # steps are for the eye: the run goes on without them
            log.warning("the workers' mailbox is gone; a new one takes its place", exc_info=True)
            return
        for item in said:
            if isinstance(item, Step):
                self._on_step(item)
            else:
                write_down(item)

    def _reply(self, call: _Call) -> Message:
        import ray

        message = call.message
        if call.late:
            return lateness(message)
        node = message.metadata.dst_node_id
        try:
            _, reply, context = ray.get(call.result)
        except ray.exceptions.RayActorError:
            log.error("client %d: its worker died in %s", node - 1, message.metadata.message_type, exc_info=True)
            self._replace(call.worker)
            self._start()
            return failure(message, "its worker process died")
        except ray.exceptions.RayError as error:
            log.error("client %d failed in %s", node - 1, message.metadata.message_type, exc_info=True)
            return failure(message, f"{type(error).__name__}: {error}")
        self.keep(context, kept(self.context(node)))
        result: Message = reply
        return result
