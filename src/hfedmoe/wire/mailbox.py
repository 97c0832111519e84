"""What a worker tells the server while it works on a message: the steps of its client, and warnings for the log."""

from dataclasses import dataclass
from logging import Handler, LogRecord, getLogger
from logging.handlers import QueueHandler
from typing import Any


@dataclass(frozen=True)
class Step:
    """A client has done one more step."""

    client: int
    step: int
    loss: float


class Mailbox:
    """Keeps what workers say until it is taken; Ray runs it in a process of its own."""

    def __init__(self) -> None:
        self._items: list[Step | LogRecord] = []

    def put(self, item: Step | LogRecord) -> None:
        """Called by the workers."""
        self._items.append(item)

    def take(self) -> list[Step | LogRecord]:
        """What is new, in order of arrival; called by the server."""
        items, self._items = self._items, []
        return items


def log_to(mailbox: Any) -> Handler:
    """A logging handler that sends records to the mailbox (Ray's handle of it)."""
    return _Sender(mailbox)


def write_down(record: LogRecord) -> None:
    """Log a worker's record here."""
    getLogger(record.name).handle(record)


class _Sender(QueueHandler):
    """Sends records, with the text of their traceback, and does not wait for anybody."""

    def enqueue(self, record: LogRecord) -> None:
        self.queue.put.remote(record)  # type: ignore[attr-defined]
