"""What the carriers of simulated clients have in common: messages, and what each client keeps between them.

A carrier decides where the clients work: in this process (`inprocess.py`), or in workers of Ray (`rayed.py`).
"""

import itertools
import time
from collections.abc import Iterable
from logging import getLogger

from flwr.app import ConfigRecord, Context, Error, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run

CLIENT_FAILED, TOO_LATE = 2, 3
"""Flower's codes for a client app that raised, and for a reply that did not come in time."""

log = getLogger(__name__)


class LocalGrid(Grid):
    """A Grid whose clients are simulated. Node ids are 1..num_clients; node n is client n - 1.

    It answers every message within its time to live, which begins when the client begins to work on it.
    `pull_messages` may wait a moment for a reply, so that nobody else has to.
    """

    most_open = 1
    """Messages that may be open at a time, so that the payloads of all clients need not be in memory at once."""

    def __init__(self, num_clients: int) -> None:
        self.num_clients = num_clients
        self._numbers = itertools.count(1)
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

    def keep(self, context: Context, before: dict[str, bytes]) -> None:
        """Store a node's context after a message, if its state (`kept`) is no longer what it was before."""
        if kept(context) != before:
            self.contexts[context.node_id] = context
            self.changed.add(context.node_id)

    def abandon(self) -> None:
        """Nobody waits for the open messages any more: they are not answered, and leave nothing with the clients."""

    def close(self) -> None:
        """No message is sent any more; what clients remember stays."""

    def set_run(self, run: Run) -> None:
        """Does nothing: there is only one run."""

    @property
    def run(self) -> Run:
        raise RuntimeError("a simulated run is not registered with a SuperLink")

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


def answer(app: ClientApp, message: Message, context: Context) -> Message:
    """A client's reply; an error if its app raised, because a failure of one client must not end the run."""
    # A reply gets the rest of the request's time to live, and time in a queue must not count.
    message.metadata.created_at = time.time()
    try:
        return app(message, context)
    except Exception as error:
        client, kind = message.metadata.dst_node_id - 1, message.metadata.message_type
        log.error("client %d failed in %s", client, kind, exc_info=True)
        return failure(message, f"{type(error).__name__}: {error}")


def failure(message: Message, reason: str) -> Message:
    """The reply of a client that failed."""
    return Message(Error(CLIENT_FAILED, reason), reply_to=message)


def lateness(message: Message) -> Message:
    """The reply instead of one that took longer than the message's time to live."""
    return Message(Error(TOO_LATE, f"no reply within {message.metadata.ttl:g} s"), reply_to=message)


def changed_contexts(grid: LocalGrid) -> dict[str, bytes]:
    """The state of clients whose state changed since the last call: bytes by node, record and name."""
    nodes, grid.changed = sorted(grid.changed), set()
    return {f"{node}/{path}": data for node in nodes for path, data in kept(grid.contexts[node]).items()}


def restore_contexts(grid: LocalGrid, saved: dict[str, bytes]) -> None:
    """Give the clients the state that `changed_contexts` returned."""
    for path, data in saved.items():
        node, key, name = path.split("/")
        state = grid.contexts.setdefault(int(node), grid.context(int(node))).state
        known = state.config_records.get(key)
        state[key] = ConfigRecord({**(dict(known) if known is not None else {}), name: data})


def kept(context: Context) -> dict[str, bytes]:
    """The bytes in a client's state, by record and name."""
    return {
        f"{key}/{name}": data
        for key, record in context.state.config_records.items()
        for name, data in record.items()
        if isinstance(data, bytes)
    }
