"""Answers in the order of the questions."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from flwr.app import Message, Metadata

from hfedmoe.errors import UserError
from hfedmoe.wire.exchange import Answer
from hfedmoe.wire.messages import record, tensors_of
from hfedmoe.wire.order import in_order


def answer(node: int, rows: int = 1000) -> Answer:
    metadata = Metadata(1, "r", node, 0, "", "", 0.0, 60.0, "train")
    content = record({"node": node}, {"x": torch.full((rows,), float(node))})
    return Answer(node, Message(content, metadata=metadata))  # type: ignore[call-overload]


def held(one: Answer) -> int:
    """Bytes of an answer's tensors in memory."""
    assert one.reply is not None
    return sum(len(array.data) for arrays in one.reply.content.array_records.values() for array in arrays.values())


@pytest.mark.parametrize("room", [1 << 20, 0], ids=["in memory", "on the disk"])
def test_early_answers_wait_for_their_turn_whole(room: int) -> None:
    came = [answer(4), Answer(1, None, "late", "no reply"), answer(3), answer(2)]
    memory: list[int] = []
    for one in in_order(came, [1, 2, 3, 4], room):
        if one.reply is not None:
            assert torch.equal(tensors_of(one.reply)["x"], torch.full((1000,), float(one.node)))
        memory.append(one.node)
    assert memory == [1, 2, 3, 4]


def test_only_so_many_bytes_wait_in_memory() -> None:
    early = [answer(node) for node in (2, 3, 4)]
    size = held(early[0])

    def come() -> Iterator[Answer]:
        yield from early
        assert [held(one) for one in early] == [size, size, 0]
        yield answer(1)

    assert [one.node for one in in_order(come(), [1, 2, 3, 4], room=2 * size)] == [1, 2, 3, 4]
    assert held(early[2]) == size


def test_answers_in_order_are_passed_on_as_they_come() -> None:
    def come() -> Iterator[Answer]:
        for node in (1, 2, 3):
            assert given == list(range(1, node))
            yield answer(node)

    given: list[int] = []
    for one in in_order(come(), [1, 2, 3], room=0):
        given.append(one.node)
    assert given == [1, 2, 3]


def test_a_disk_without_room_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(UserError, match="missing: cannot be written"):
        list(in_order([answer(2), answer(1)], [1, 2], room=0))
