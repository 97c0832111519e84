"""The default carrier: a Flower Grid that runs the clients in this process, one after the other.

A message is delivered when its reply is asked for, so that replies can be folded in one by one.
"""

import itertools
import time
from collections.abc import Iterable, Iterator
from logging import getLogger

from flwr.app import ConfigRecord, Context, Error, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run

CLIENT_FAILED, TOO_LATE = 2, 3
"""Flower's codes for a client app that raised, and for a reply that did not come in time."""

log = getLogger(__name__)


class InProcessGrid(Grid):
    """Calls a ClientApp directly. Node ids are 1..num_clients; node n is client n - 1.

    If a client takes longer than its message's time to live, the reply is an error, as from a SuperLink.
    """

    def __init__(self, app: ClientApp, num_clients: int) -> None:
        self._app = app
        self.num_clients = num_clients
        self._numbers = itertools.count(1)
        self._waiting: dict[str, Message] = {}
        self.contexts: dict[int, Context] = {}
        """Only of nodes with state: when there are many clients, most are never sampled."""
        self.changed: set[int] = set()
        """Nodes changed since the last call of `changed_contexts`."""

    def context(self, node: int) -> Context:
        """A node's context, or a new one, which is not stored yet."""
        return self.contexts.get(node) or Context(
            run_id=1,
            node_id=node,
            node_config={"partition-id": node - 1, "num-partitions": self.num_clients},
            state=RecordDict(),
            run_config={},
            series_id=0,
        )

    def set_run(self, run: Run) -> None:
        """Does nothing: there is only one run."""

    @property
    def run(self) -> Run:
        raise RuntimeError("an in-process run is not registered with a SuperLink")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to one of the clients."""
        metadata = Metadata(
            run_id=1,
            message_id=str(next(self._numbers)),
            src_node_id=0,
            dst_node_id=dst_node_id,
            reply_to_message_id="",
            group_id=group_id,
            created_at=time.time(),
            ttl=ttl or 3600.0,
            message_type=message_type,
        )
        return Message(content, metadata=metadata)  # type: ignore[call-overload]

    def get_node_ids(self) -> Iterable[int]:
        """All clients: they are always connected."""
        return range(1, self.num_clients + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; each is delivered when it is pulled."""
        ids = []
        for message in messages:
            self._waiting[message.metadata.message_id] = message
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Deliver the waiting messages one by one, and yield each reply."""
        for message_id in list(message_ids):
            message = self._waiting.pop(message_id, None)
            if message is not None:
                yield self._deliver(message)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Deliver all messages and return their replies."""
        return list(self.pull_messages(self.push_messages(messages)))

    def _deliver(self, message: Message) -> Message:
        started = time.monotonic()
        # A reply gets the rest of the request's time to live, and time in the queue must not count.
        message.metadata.created_at = time.time()
        node = message.metadata.dst_node_id
        context = self.context(node)
        before = _kept(context)
        try:
            reply = self._app(message, context)
        except Exception as error:  # a failure of one client must not end the run
            log.error("client %d failed in %s", node - 1, message.metadata.message_type, exc_info=True)
            return Message(Error(CLIENT_FAILED, f"{type(error).__name__}: {error}"), reply_to=message)
        finally:
            if _kept(context) != before:
                self.contexts[node] = context
                self.changed.add(node)
        if time.monotonic() - started > message.metadata.ttl:
            return Message(Error(TOO_LATE, f"no reply within {message.metadata.ttl:g} s"), reply_to=message)
        return reply


def changed_contexts(grid: InProcessGrid) -> dict[str, bytes]:
    """The state of clients whose state changed since the last call: bytes by node, record and name."""
    nodes, grid.changed = sorted(grid.changed), set()
    return {f"{node}/{path}": data for node in nodes for path, data in _kept(grid.contexts[node]).items()}


def restore_contexts(grid: InProcessGrid, saved: dict[str, bytes]) -> None:
    """Give the clients the state that `changed_contexts` returned."""
    for path, data in saved.items():
        node, key, name = path.split("/")
        state = grid.contexts.setdefault(int(node), grid.context(int(node))).state
        known = state.config_records.get(key)
        state[key] = ConfigRecord({**(dict(known) if known is not None else {}), name: data})


def _kept(context: Context) -> dict[str, bytes]:
    """The bytes in a client's state, by record and name."""
    return {
        f"{key}/{name}": data
        for key, record in context.state.config_records.items()
        for name, data in record.items()
        if isinstance(data, bytes)
    }
