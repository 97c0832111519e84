"""Take the answers of clients in the order in which they were asked, whoever answers first.

Sums of floating-point numbers depend on their order. With this, a run does not depend on who is fast.
"""

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from flwr.app import Array

from hfedmoe.files.disk import disk_errors
from hfedmoe.wire.exchange import Answer

ROOM = 256 << 20
"""Bytes of early answers that are kept in memory; more wait in a temporary file each."""


def in_order(answers: Iterable[Answer], nodes: Sequence[int], room: int = ROOM) -> Iterator[Answer]:
    """The answers in the order of `nodes`, each as soon as those before it are there.

    Args:
        answers: one for every node, in any order.
        room: bytes of tensors that early answers may hold in memory.

    Raises:
        UserError: the disk has no room for early answers.
    """
    with contextlib.ExitStack() as files:
        early: dict[int, _Early] = {}
        held, turn = 0, 0
        for answer in answers:
            one = _Early(answer)
            early[answer.node] = one
            if answer.node != nodes[turn] and held + one.size > room:
                one.store(files)
            held += one.in_memory
            del answer, one  # when its turn is over, nobody else may hold it
            while turn < len(nodes) and nodes[turn] in early:
                due = early.pop(nodes[turn])
                held -= due.in_memory
                turn += 1
                yield due.restored()
                del due


class Shelf:
    """Answers that wait until all of a round are there. Beyond `room` bytes each waits in a temporary file."""

    def __init__(self, room: int = ROOM) -> None:
        self._room, self._held = room, 0
        self._files = contextlib.ExitStack()
        self._kept: list[tuple[tuple[int, ...], int, _Early]] = []

    def put(self, key: tuple[int, ...], answer: Answer) -> None:
        """Keep an answer. Raises UserError if the disk has no room for it."""
        one = _Early(answer)
        if self._held + one.size > self._room:
            one.store(self._files)
        self._held += one.in_memory
        self._kept.append((key, len(self._kept), one))

    def take(self) -> Iterator[tuple[tuple[int, ...], Answer]]:
        """All answers by key, equal ones in the order in which they came; each is forgotten then."""
        with self._files:
            self._kept.sort(key=lambda kept: kept[:2], reverse=True)
            while self._kept:
                key, _, one = self._kept.pop()
                yield key, one.restored()
                del one


class _Early:
    """An answer that waits for its turn."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._file: IO[bytes] | None = None
        self._sizes: list[int] = []
        self.size = sum(len(array.data) for array in self._arrays())

    @property
    def in_memory(self) -> int:
        return self.size if self._file is None else 0

    def _arrays(self) -> list[Array]:
        reply = self._answer.reply
        if reply is None:
            return []
        return [array for arrays in reply.content.array_records.values() for array in arrays.values()]

    def store(self, files: contextlib.ExitStack) -> None:
        """Move the bytes of its tensors to a file, which ends with `files` at the latest."""
        with disk_errors(Path(tempfile.gettempdir()), "go on with the run; TMPDIR names another folder"):
            self._file = files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 (until `restored`)
            for array in self._arrays():
                self._sizes.append(self._file.write(array.data))
                array.data = b""

    def restored(self) -> Answer:
        if self._file is not None:
            self._file.seek(0)
            for array, size in zip(self._arrays(), self._sizes, strict=True):
                array.data = self._file.read(size)
            self._file.close()
        return self._answer
