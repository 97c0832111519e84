"""The default carrier: a Flower Grid that runs the clients in this process, one after the other.

A message is delivered when its reply is asked for, so that replies can be folded in one by one.
"""

import time
from collections.abc import Iterable, Iterator

from flwr.app import Message
from flwr.clientapp import ClientApp

from hfedmoe.wire.local import LocalGrid, answer, kept, lateness


class InProcessGrid(LocalGrid):
    """Calls a ClientApp directly.

    If a client takes longer than its message's time to live, the reply is an error, as from a SuperLink.
    """

    def __init__(self, app: ClientApp, num_clients: int) -> None:
        super().__init__(num_clients)
        self._app = app
        self._waiting: dict[str, Message] = {}

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

    def abandon(self) -> None:
        """As `LocalGrid`."""
        self._waiting.clear()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Deliver all messages and return their replies."""
        return list(self.pull_messages(self.push_messages(messages)))

    def _deliver(self, message: Message) -> Message:
        started = time.monotonic()
        context = self.context(message.metadata.dst_node_id)
        before = kept(context)
        try:
            reply = answer(self._app, message, context)
        finally:
            self.keep(context, before)
        return lateness(message) if time.monotonic() - started > message.metadata.ttl else reply
