"""Send the figures of a run to one tracker, in a thread: in order, each round once, again later what failed."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hfedmoe.report.tracking.figures import Figures
from hfedmoe.report.tracking.process import TrackerError, TrackerProcess
from hfedmoe.report.tracking.start import Start, Status
from hfedmoe.report.tracking.state import State

RETRY_S, LONGEST_RETRY_S = 60.0, 1800.0
"""Seconds until a tracker that failed is tried again: at first, and at most; they double."""


@dataclass(frozen=True)
class Item:
    """What is sent at once: the figures of a round, or what the sites gained, with the last round."""

    round: int
    figures: Figures
    gains: bool = False


Recorded = Callable[[int], Iterator[Item]]
"""What the run's folder has after a round."""


class Sender(threading.Thread):
    """One tracker of a run.

    Args:
        start: of the run; the rest of it is in `state`.
        recorded: read again if the tracker has less than it confirmed; None: without a folder.
        log: file for what the library prints.
        at_most: the last round that the tracker may have; None: as `state` says.
    """

    def __init__(
        self,
        name: str,
        start: Start,
        state: State,
        recorded: Recorded | None,
        log: Path | None,
        timeout_s: float,
        at_most: int | None = None,
    ) -> None:
        super().__init__(name=f"tracking-{name}", daemon=True)
        self.tracker = name
        self.failure: str | None = None
        """Of the last attempt."""
        self.places: deque[str] = deque()
        """Where the run can be found, until somebody says so."""
        self._start, self._state, self._recorded = start, state, recorded
        self._log, self._timeout_s = log, timeout_s
        known = state.of(name)
        self.sent: int = known["sent"] if at_most is None else min(known["sent"], at_most)
        """The last round that the tracker has; -1: none."""
        self._gains = bool(known["gains"]) and self.sent == known["sent"]
        """Whether it has what the sites gained, or will get it."""
        self._items: deque[Item] = deque()
        self._changed = threading.Condition()
        self._closing: Status | None = None
        self._given_up = False
        self._process: TrackerProcess | None = None
        self._pause_s, self._next_try = RETRY_S, 0.0

    @property
    def unsent(self) -> int:
        """How many items wait."""
        return len(self._items)

    def put(self, item: Item) -> None:
        """Send this after all that was put before, unless the tracker has it. Returns at once."""
        with self._changed:
            if self._gains if item.gains else item.round <= self.sent:
                return
            self._gains |= item.gains
            self._items.append(item)
            self._changed.notify()

    def close(self, status: Status) -> None:
        """Send what waits, then end. Returns at once; `join` waits for it."""
        with self._changed:
            self._closing = status
            self._changed.notify()

    def give_up(self, reason: str) -> None:
        """End at once, whatever waits."""
        with self._changed:
            self.failure = self.failure or reason
            self._given_up = True
            self._changed.notify()
        process = self._process
        if process is not None:
            process.kill()

    def run(self) -> None:
        """As `threading.Thread`."""
        while (wanted := self._wait()) is not None:
            try:
                self._open()
                if isinstance(wanted, Item):
                    self._send()
                else:
                    self._close(wanted)
                    return
            except (TrackerError, OSError) as error:
                self._failed(str(error))
                if self._closing is not None:
                    return

    def _wait(self) -> Item | Status | None:
        """What is to be done next, when it is time: an item, or closing with a status. None: nothing any more."""
        with self._changed:
            while True:
                if self._given_up:
                    return None
                pause = self._next_try - time.monotonic()
                if self._closing is not None:
                    if pause > 0:
                        return None  # it failed a moment ago
                    if self._items:
                        return self._items[0]
                    return self._closing if self._must_close() else None
                if self._items and pause <= 0:
                    return self._items[0]
                self._changed.wait(pause if self._items else None)

    def _must_close(self) -> bool:
        """Whether the tracker does not know yet how the run ended."""
        known = self._state.of(self.tracker)
        return self._process is not None or (self.sent >= 0 and known["status"] != self._closing)

    def _open(self) -> None:
        if self._process is not None:
            return
        store = self._state.of(self.tracker)["store"] or self._start.store
        start = replace(self._start, next_round=self.sent + 1, store=store)
        self._process = TrackerProcess(self.tracker, self._log, self._timeout_s)
        if self._given_up:
            raise TrackerError("given up")
        found = self._process.ask({"do": "open", "start": asdict(start)})
        self.places.append(found["place"])
        self._state.note(self.tracker, store=found["store"], status=None)
        if found["last"] is not None:
            self._agree(int(found["last"]))

    def _agree(self, last: int) -> None:
        """The tracker knows its last round better than what was noted when one of both was killed."""
        with self._changed:
            if last > self.sent:
                self._items = deque(item for item in self._items if item.gains or item.round > last)
            elif last < self.sent and self._recorded is not None:
                missing = [item for item in self._recorded(last) if not item.gains and item.round <= self.sent]
                self._items.extendleft(reversed(missing))
            else:
                return
            self.sent = last

    def _send(self) -> None:
        assert self._process is not None
        if not self._items:  # the tracker has it already
            return
        item = self._items[0]
        self._process.ask({"do": "gains" if item.gains else "log", "round": item.round, "figures": item.figures})
        with self._changed:
            self._items.popleft()
            self.sent = self.sent if item.gains else item.round
        self._pause_s = RETRY_S
        self._state.note(self.tracker, **({"gains": True} if item.gains else {"sent": self.sent}))

    def _close(self, status: Status) -> None:
        assert self._process is not None
        self._process.ask({"do": "close", "status": status})
        self._process.end()
        self._state.note(self.tracker, status=status)

    def _failed(self, reason: str) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None
        if self._given_up:
            return
        self.failure = reason
        self._next_try = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_RETRY_S)
