"""A carrier whose clients come and go, with the clients of this process behind it."""

from collections.abc import Iterable, Iterator
from typing import Any

from flwr.app import Message, Metadata
from flwr.proto.node_pb2 import NodeInfo

from hfedmoe.wire.exchange import Request
from hfedmoe.wire.inprocess import InProcessGrid


def message_to(_: Any, request: Request, group: str, ttl: float) -> Message:
    """In place of `wire.exchange._message`, which needs the task that Flower gives to a server app."""
    metadata = Metadata(1, "", 0, request.node, "", group, 0.0, ttl, request.kind)
    return Message(request.content, metadata=metadata)  # type: ignore[call-overload]


class Network:
    """Delivers messages to connected nodes only; a restarted node does not know what was sent to it before."""

    def __init__(self, inner: InProcessGrid, *nodes: int) -> None:
        self._inner = inner
        self.up: dict[int, str] = dict.fromkeys(nodes, "first")
        """Since when a node is connected."""
        self.is_now: dict[int, int] = {}
        """Nodes under a new id: the node that they were."""
        self.asleep: set[int] = set()
        """Nodes that get messages, but do not answer."""
        self.got: list[tuple[str, int, bool]] = []
        """Kind, node, and whether there were tensors."""
        self.last_first = False
        """Whether replies come in the reverse order of the requests."""
        self._waiting: dict[str, tuple[int, str, str]] = {}

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node, last_activated_at=since) for node, since in self.up.items()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        sent = []
        for message in messages:
            to: Metadata = message.metadata
            if to.dst_node_id not in self.up:
                sent.append("")
                continue
            node = self.is_now.get(to.dst_node_id, to.dst_node_id)
            own = self._inner.create_message(message.content, to.message_type, node, to.group_id, to.ttl)
            (message_id,) = self._inner.push_messages([own])
            self._waiting[message_id] = to.dst_node_id, self.up[to.dst_node_id], to.message_type
            self.got.append((to.message_type, to.dst_node_id, bool(message.content.array_records)))
            sent.append(message_id)
        return sent

    def pull_messages(self, ids: Iterable[str]) -> Iterator[Message]:
        for one in ids:
            kind = self._waiting[one][2]
            later = [other for other, (_, _, like) in self._waiting.items() if int(other) > int(one) and like == kind]
            if self.last_first and any(map(self._answers, later)):
                continue
            if self._answers(one):
                del self._waiting[one]
                yield from self._inner.pull_messages([one])

    def _answers(self, message_id: str) -> bool:
        node, since, _ = self._waiting[message_id]
        return self.up.get(node) == since and node not in self.asleep
