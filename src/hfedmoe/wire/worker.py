"""A worker of Ray: it works for one simulated client after the other, in a process of its own.

While it works it tells the server the steps of its clients, and its warnings for the run's log.
"""

from collections.abc import Callable
from dataclasses import dataclass
from logging import WARNING, LogRecord, getLogger
from logging.handlers import QueueHandler
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from hfedmoe.wire.local import answer

if TYPE_CHECKING:
    from ray.util.queue import Queue

TOLD_S = 5.0
"""Most seconds that a reply waits for the server to have been told all steps before it."""

OnStep = Callable[[int, int, float], None]
"""Is called with (client, step, loss) after every local step."""
MakeApp = Callable[[OnStep], ClientApp]
"""Makes the app of all clients, in a worker."""


@dataclass(frozen=True)
class Step:
    """A client has done one more step."""

    client: int
    step: int
    loss: float


Said = Step | LogRecord


class Worker:
    """What Ray runs in the worker's process. `said`: where it tells the server what happens."""

    def __init__(self, said: "Queue") -> None:
        self._said = said
        self._last: Any = None
        handler = _ToServer(self)
        handler.setLevel(WARNING)
        getLogger("hfedmoe").addHandler(handler)

    def open(self, make_app: MakeApp) -> None:
        """Make the clients' app, which loads the model and the rows."""
        self._app = make_app(lambda client, step, loss: self.tell(Step(client, step, loss)))

    def answer(self, message: Message, context: Context) -> tuple[Message, Context]:
        """A client's reply, and what the client remembers from now on."""
        import ray

        reply = answer(self._app, message, context)
        if self._last is not None:
            ray.wait([self._last], timeout=TOLD_S)
            self._last = None
        return reply, context

    def tell(self, what: Said) -> None:
        """Tell the server something, and go on at once."""
        self._last = self._said.actor.put_nowait.remote(what)


class _ToServer(QueueHandler):
    """Sends log records, with the text of their traceback."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)  # type: ignore[arg-type]

    def enqueue(self, record: LogRecord) -> None:
        self.queue.tell(record)  # type: ignore[attr-defined]
