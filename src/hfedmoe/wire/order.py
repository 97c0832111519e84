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
