"""Training that clients were asked for and have not answered yet. It may outlive its round."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from hfedmoe.server.attendance import Attendance
from hfedmoe.server.members import Member
from hfedmoe.wire.exchange import LOOK_S, MOST_POLL_S, POLL_S, Answer, Pause, Request
from hfedmoe.wire.messages import unpack_bits


@dataclass
class Work:
    """One client's training, asked for and not answered yet."""

    member: Member
    round: int
    resident_bits: bytes
    """What it was given to hold."""
    tensors: dict[str, Tensor] = field(repr=False)
    """The global tensors that it began with; empty if they are not needed."""
    bytes_down: int = 0
    bytes_up: int = 0
    """Of its plan; both are counted once, with the first thing that is noted of it."""
    dropped: bool = False
    """Whether its update is not used when it comes; until then the client is busy."""

    @property
    def resident(self) -> list[Tensor]:
        """bool [E] per layer."""
        return unpack_bits(self.resident_bits, self.member.about.num_experts)


Make = Callable[[], tuple[Work, Request]]


class Works:
    """All training that is going on, of this round and of earlier ones."""

    def __init__(self, attendance: Attendance) -> None:
        self._waiting = attendance.waiting("train")
        self._most_open = attendance.most_open
        self._queue: deque[Make] = deque()
        self._by_node: dict[int, Work] = {}

    def ask(self, make: Make) -> None:
        """Ask a client soon; `make` is called when its turn comes, so that not all payloads are there at once."""
        self._queue.append(make)

    def take_back(self) -> None:
        """Do not ask those whose turn has not come."""
        self._queue.clear()

    @property
    def waits(self) -> bool:
        """Whether an update is still to be expected."""
        return bool(self._queue or self.going_on)

    def waits_for(self, round: int) -> bool:
        """Whether an update of this round is still to be expected."""
        return bool(self._queue) or any(work.round == round for work in self.going_on)

    @property
    def going_on(self) -> list[Work]:
        """Those whose answers are waited for, in the order of asking."""
        return [work for work in self._by_node.values() if not work.dropped]

    def is_busy(self, member: Member) -> bool:
        """Whether a client has not answered yet."""
        return member.node in self._by_node

    def answers(self, goes_on: Callable[[], bool]) -> Iterator[tuple[Work, Answer]]:
        """Ask, and yield answers as they come, while `goes_on` says so and an answer is to be expected."""
        pause = Pause(POLL_S, MOST_POLL_S)
        while goes_on() and (self._queue or self._by_node):
            found = False
            for pair in self._arrived():
                found = True
                yield pair
                if not goes_on():
                    return
            if found:
                pause.reset()
            elif self._most_open is None:
                pause.wait()

    def _arrived(self) -> Iterator[tuple[Work, Answer]]:
        yield from self._send()
        for answers in (self._waiting.replies(), self._waiting.given_up()):
            for answer in answers:
                yield self._of(answer)
                yield from self._send()  # who has answered may be asked again, and need not wait for others

    def _send(self) -> Iterator[tuple[Work, Answer]]:
        looked = time.monotonic()
        while self._queue and (self._most_open is None or len(self._waiting) < self._most_open):
            work, request = self._queue.popleft()()
            self._by_node[request.node] = work
            for answer in self._waiting.send(request):
                yield self._of(answer)
            if self._most_open is None and time.monotonic() - looked >= LOOK_S:
                return  # replies must not grow old while others are asked

    def _of(self, answer: Answer) -> tuple[Work, Answer]:
        return self._by_node.pop(answer.node), answer
