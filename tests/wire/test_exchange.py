"""Messages to many clients, each with a deadline of its own."""

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from flwr.app import Message, Metadata, RecordDict

from hfedmoe.wire import exchange as module
from hfedmoe.wire.exchange import Request, exchange


class Slow:
    """A carrier whose uploads take long, on a clock that only it moves; every client answers at once."""

    def __init__(self, upload_s: float, silent: tuple[int, ...] = ()) -> None:
        self.now, self.upload_s, self.silent = 0.0, upload_s, silent
        self.sent: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        for message in messages:
            self.now += self.upload_s
            self.sent[str(len(self.sent))] = message
        return [str(len(self.sent) - 1)]

    def pull_messages(self, ids: Iterable[str]) -> Iterator[Message]:
        for one in ids:
            if self.sent[one].metadata.dst_node_id not in self.silent:
                metadata = Metadata(1, "r", 0, 0, one, "", 0.0, 60.0, "train")
                yield Message(RecordDict(), metadata=metadata)  # type: ignore[call-overload]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(grid: Slow) -> None:
        def sleep(seconds: float) -> None:
            grid.now += seconds

        def message(grid: Any, request: Request, group: str, ttl: float) -> Message:
            metadata = Metadata(1, "", 0, request.node, "", group, 0.0, ttl, request.kind)
            return Message(request.content, metadata=metadata)  # type: ignore[call-overload]

        monkeypatch.setattr(module.time, "monotonic", lambda: grid.now)
        monkeypatch.setattr(module.time, "sleep", sleep)
        monkeypatch.setattr(module, "_message", message)

    return use


def test_a_slow_upload_to_the_others_makes_nobody_late(clock: Any) -> None:
    grid = Slow(upload_s=40.0)
    clock(grid)
    requests = [Request(node, "train", RecordDict()) for node in (1, 2, 3)]
    answers = list(exchange(grid, requests, "g", timeout_s=50.0))  # type: ignore[arg-type]
    assert {answer.node: answer.status for answer in answers} == {1: "ok", 2: "ok", 3: "ok"}


def test_who_does_not_answer_is_late_by_a_deadline_of_its_own(clock: Any) -> None:
    grid = Slow(upload_s=40.0, silent=(1, 3))
    clock(grid)
    requests = [Request(node, "train", RecordDict()) for node in (1, 2, 3)]
    when = {}
    for answer in exchange(grid, requests, "g", timeout_s=50.0):  # type: ignore[arg-type]
        when[answer.node] = (answer.status, round(grid.now))
    # Sent at 40, 80 and 120 s; answers are taken between uploads, and no deadline waits for another's upload.
    assert when == {2: ("ok", 80), 1: ("late", 120), 3: ("late", 175)}
