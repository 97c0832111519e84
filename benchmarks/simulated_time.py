"""A carrier in simulated time: every client takes as long as it is told, and nobody waits for it in reality."""

from collections.abc import Callable, Iterable

from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo

from benchmarks.device_grid import DeviceGrid
from hfedmoe.wire.local import LocalGrid
from hfedmoe.wire.messages import TRAIN


class SimulatedTime(DeviceGrid):
    """Clients of another grid as devices, each with a speed of its own.

    A client works in this process when its reply is taken; the reply is there when the simulated clock says so. The
    clock goes on when the server asks for the reply that is ready first; so it counts training and nothing else.

    Args:
        seconds: of one training, by client number.
    """

    def __init__(self, clients: LocalGrid, seconds: Callable[[int], float]) -> None:
        super().__init__()
        self._clients, self._seconds = clients, seconds
        self._open: dict[str, float] = {}
        """When the reply to a message is ready."""
        self._free_at: dict[int, float] = {}
        self.now = 0.0
        """Seconds since the begin."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Ask clients; a busy one begins when it is done with what it was asked before."""
        ids = []
        for message in messages:
            meta, node = message.metadata, message.metadata.dst_node_id
            inner = self._clients.create_message(message.content, meta.message_type, node, meta.group_id, meta.ttl)
            (name,) = self._clients.push_messages([inner])
            took = self._seconds(node - 1) if meta.message_type == TRAIN else 0.0
            ready = max(self.now, self._free_at.get(node, 0.0)) + took
            self._free_at[node] = ready
            self._open[name] = ready
            ids.append(name)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are ready, or the next one that will be."""
        wanted = set(message_ids) & self._open.keys()
        if wanted and self._open:
            first = min(self._open, key=lambda name: self._open[name])
            if first in wanted:
                self.now = max(self.now, self._open[first])
        for name in sorted(wanted, key=lambda name: self._open[name]):
            if self._open[name] <= self.now:
                del self._open[name]
                yield from self._clients.pull_messages([name])

    def get_node_ids(self) -> Iterable[int]:
        """All clients."""
        return self._clients.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        """All clients, always connected."""
        return [NodeInfo(node_id=node) for node in self.get_node_ids()]
