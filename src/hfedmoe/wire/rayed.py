"""The carrier with several clients at once: a Flower Grid whose clients work in workers of Ray.

Replies are handed on in the order of the requests, whoever is ready first: sums of float32 numbers depend on their
order, and a run must end with the same bits every time.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from logging import getLogger
from typing import Any

from flwr.app import Message, RecordDict

from hfedmoe.errors import UserError
from hfedmoe.events import Watcher
from hfedmoe.wire.cluster import Cluster
from hfedmoe.wire.local import LocalGrid, failure, kept, lateness
from hfedmoe.wire.worker import MakeApp, Step

AHEAD = 2
"""Open messages for every worker: while the reply of a slow client is awaited, its fellows have something to do."""
PAUSE_S = 0.05
"""Most seconds between two looks at what the workers say."""

log = getLogger(__name__)


@dataclass
class _Call:
    """A message and, when there is one, its reply."""

    message: Message
    reply: Message | None = None
    worker: Any = None
    """Ray's handle of the worker that has it."""
    deadline: float = 0.0
    """On the clock of `time.monotonic`."""


class RayGrid(LocalGrid):
    """Gives messages to workers.

    A worker that dies costs the reply of the client that it worked for, and so does a client that takes longer than its
    message's time to live: the reply is an error, and a new worker takes the place. A worker that dies while it
    loads the model, or because its machine ran out of memory, is not replaced: there is no memory for so many.

    Args:
        make_app: makes the clients' app in a worker.
        watcher: is told every step of a client, and of workers that are given up.
        steps: of a client in a round.

    `pull_messages` raises UserError if a worker cannot use the model or the rows, or if no worker is left.
    """

    def __init__(self, make_app: MakeApp, num_clients: int, cluster: Cluster, watcher: Watcher, steps: int) -> None:
        import ray

        super().__init__(num_clients)
        self.most_open = AHEAD * cluster.at_once
        self._cluster, self._watcher, self._steps = cluster, watcher, steps
        self._make_app = ray.put(make_app)
        self._said: Any = cluster.queue()
        self._starting: dict[Any, tuple[Any, float]] = {}
        """Workers that load the model, and until when they may, by Ray's reference to the end of it."""
        self._idle: list[Any] = []
        self._busy: dict[Any, _Call] = {}
        """By Ray's reference to what the worker returns."""
        self._open: dict[str, _Call] = {}
        """By message, in the order in which they were pushed."""
        self._queue: deque[_Call] = deque()
        for _ in range(cluster.at_once):
            self._new_worker()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Give messages to idle workers; those that are too many wait."""
        ids = []
        for message in messages:
            call = _Call(message)
            self._open[message.metadata.message_id] = call
            self._queue.append(call)
            ids.append(message.metadata.message_id)
        self._hand_out()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """The replies that are there, but none before that of an earlier message."""
        for message_id in list(message_ids):
            if message_id != next(iter(self._open), None):
                continue
            call = self._open[message_id]
            if call.reply is None:
                self._look()
            if call.reply is not None:
                del self._open[message_id]
                yield call.reply

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Deliver all messages and return their replies."""
        ids = list(self.push_messages(messages))
        replies: list[Message] = []
        while len(replies) < len(ids):
            replies += list(self.pull_messages(ids[len(replies) :]))
        return replies

    def abandon(self) -> None:
        """As `LocalGrid`; workers that have one of them are replaced."""
        self._queue.clear()
        self._open.clear()
        busy, self._busy = self._busy, {}
        for call in busy.values():
            self._replace(call.worker)

    def close(self) -> None:
        """End all workers, which makes room for those of another grid."""
        import ray

        for worker in [
            *(one for one, _ in self._starting.values()),
            *self._idle,
            *(c.worker for c in self._busy.values()),
        ]:
            ray.kill(worker)
        if self._said is not None:
            self._said.shutdown(force=True)

    def _new_worker(self) -> None:
        worker = self._cluster.worker(self._said)
        until = time.monotonic() + self._cluster.settings.start_timeout_s
        self._starting[worker.open.remote(self._make_app)] = worker, until

    def _hand_out(self) -> None:
        """Give waiting messages to idle workers."""
        while self._idle and self._queue:
            call = self._queue.popleft()
            message, call.worker = call.message, self._idle.pop()
            message.metadata.created_at = time.time()
            call.deadline = time.monotonic() + message.metadata.ttl
            self._busy[call.worker.answer.remote(message, self.context(message.metadata.dst_node_id))] = call
            message.content = RecordDict()  # Ray has it now

    def _look(self) -> None:
        """Wait a moment for workers, note who is ready or too late, hand out more, and hear what the workers say."""
        import ray

        at_work = [*self._starting, *self._busy]
        ray.wait(at_work, num_returns=1, timeout=PAUSE_S)
        ready, _ = ray.wait(at_work, num_returns=len(at_work), timeout=0)
        self._listen()  # before the replies: steps come before the end
        for reference in ready:
            if reference in self._busy:
                self._finished(reference, self._busy.pop(reference))
            else:
                self._started(reference, *self._starting.pop(reference))
        now = time.monotonic()
        for reference in [one for one, call in self._busy.items() if now > call.deadline]:
            call = self._busy.pop(reference)
            call.reply = lateness(call.message)
            self._replace(call.worker)
        for reference in [one for one, (_, until) in self._starting.items() if now > until]:
            worker, _ = self._starting.pop(reference)
            ray.kill(worker)
            self._give_up(f"it was not ready within {self._cluster.settings.start_timeout_s:g} s")
        self._hand_out()

    def _started(self, reference: Any, worker: Any, until: float) -> None:
        """A worker has loaded the model, or could not."""
        import ray

        try:
            ray.get(reference)
        except ray.exceptions.RayError as error:
            if isinstance(getattr(error, "cause", None), UserError):  # of the model, the rows or the installation
                raise UserError(f"a worker of Ray cannot start: {error.cause}") from None
            log.error("a worker could not start", exc_info=True)
            ray.kill(worker)
            self._give_up(_why(error))
        else:
            self._idle.append(worker)

    def _finished(self, reference: Any, call: _Call) -> None:
        """A worker has answered, or died."""
        import ray

        client, kind = call.message.metadata.dst_node_id - 1, call.message.metadata.message_type
        try:
            call.reply, context = ray.get(reference)
        except ray.exceptions.RayError as error:
            log.error("client %d: no reply from its worker in %s", client, kind, exc_info=True)
            call.reply = failure(call.message, _why(error))
            if isinstance(error, ray.exceptions.OutOfMemoryError) and self._left():  # another one would have to go soon
                ray.kill(call.worker)
                self._give_up(_why(error))
            else:
                self._replace(call.worker)
        else:
            self.keep(context, kept(self.context(client + 1)))
            self._idle.append(call.worker)

    def _replace(self, worker: Any) -> None:
        import ray

        ray.kill(worker)
        self._new_worker()

    def _give_up(self, reason: str) -> None:
        """Go on with one worker less. Raises UserError if it was the last one."""
        if not self._left():
            raise UserError(
                f"no worker of Ray could load the model: {reason}; its machine may have too little memory, or other "
                "work (`ray status` shows it)"
            )
        self._watcher.warning(f"a worker is given up ({reason}); the run goes on with {self._left()}")

    def _left(self) -> int:
        """Workers that work, wait or start."""
        return len(self._starting) + len(self._idle) + len(self._busy)

    def _listen(self) -> None:
        import ray

        if self._said is None:
            return
        try:
            said = self._said.get_nowait_batch(self._said.qsize())
        except ray.exceptions.RayError:  # the run itself does not need it
            log.error("nothing is heard of the workers any more but their replies", exc_info=True)
            self._watcher.warning("the steps of clients are not shown any more; the run's log says why")
            self._said = None
            return
        at_work = {call.message.metadata.dst_node_id - 1 for call in self._busy.values()}
        for item in said:
            if not isinstance(item, Step):
                getLogger(item.name).handle(item)
            elif item.client in at_work:  # else it is from a worker that was given up
                self._watcher.step(item.client, item.step, self._steps, item.loss)


def _why(error: Exception) -> str:
    """What became of a worker, in a line."""
    import ray

    if isinstance(error, ray.exceptions.RayTaskError):
        return f"{type(error.cause).__name__}: {error.cause}"
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "its machine ran out of memory"
    return "its worker process died"
