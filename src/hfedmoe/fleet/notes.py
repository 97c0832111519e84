"""What a server is doing now, in `serving.json`, for `hfedmoe status` and `hfedmoe stop`.

With many devices it takes long to write, so it is not written at every event: the server looks after its fleet twice a
second, and what was left out is written then, as soon as the time for writing allows it.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from hfedmoe.errors import UserError
from hfedmoe.events import ClientRound, Evaluation, Forwarding, Participant, Watcher
from hfedmoe.files.disk import replacing
from hfedmoe.fleet.front import Board

SHARE, MOST_SAVED_S = 0.1, 1.0
"""The share of the time that may go into writing, and the most of it that is saved up while nothing is written."""


class Notes(Forwarding):
    """Passes events on to another watcher, and notes what `status` shows.

    Args:
        run: the run's folder.
        clock: in seconds.
    """

    def __init__(self, inner: Watcher, board: Board, run: Path, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(inner)
        self._board, self._clock = board, clock
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._saved_s, self._at = MOST_SAVED_S, clock()
        self._warned = False
        self._names: list[str] = []
        self._facts: dict[str, Any] = {
            "pid": os.getpid(),
            "run": str(run.absolute()),
            "round": 0,
            "rounds": 0,
            "doing": "starting",
        }
        self._devices: dict[str, dict[str, Any]] = {}
        self.in_round = False

    def write(self) -> None:
        """Write the file, if there is time for it and no other thread does so now; a failure is said once."""
        if not self._writing.acquire(blocking=False):
            return
        try:
            now = self._clock()
            self._saved_s, self._at = min(MOST_SAVED_S, self._saved_s + SHARE * (now - self._at)), now
            if self._saved_s > 0:
                self._try()
                self._saved_s -= self._clock() - now
        finally:
            self._writing.release()

    def _try(self) -> None:
        file = self._board.folder.serving
        try:
            content = json.dumps(self._content()).encode()
            with replacing(file) as stream:
                stream.write(content)
            self._warned = False
        except (OSError, UserError) as error:  # of a full disk, or a damaged roster: no reason to end a run
            if not self._warned:
                reason = error.strerror if isinstance(error, OSError) else str(error)
                self.warning(f"{file}: cannot be written ({reason}), so `hfedmoe status` shows what was before")
            self._warned = True

    def _content(self) -> dict[str, Any]:
        with self._lock:
            facts, devices = dict(self._facts), {name: dict(noted) for name, noted in self._devices.items()}
        known = {}
        for device in self._board.invited().values():
            seen = self._board.seen.get(device.name)
            known[device.name] = {
                "seen": None if seen is None else round(seen.at, 1),
                "versions": "" if seen is None else seen.versions,
                **devices.get(device.name, {}),
            }
        return facts | {"at": time.time(), "devices": known}

    def _note_device(self, name: str, **facts: Any) -> None:
        with self._lock:
            self._devices.setdefault(name, {}).update(facts)
        self.write()

    def _note(self, **facts: Any) -> None:
        with self._lock:
            self._facts |= facts
        self.write()

    def start(
        self,
        title: str,
        num_rounds: int,
        first_round: int,
        clients: Sequence[Participant],
        history: Sequence[Evaluation] = (),
    ) -> None:
        self._names = [client.name for client in clients]
        with self._lock:
            for client in clients:
                self._devices[client.name] = _part(client, f"from round {first_round}")
        self._note(round=first_round - 1, rounds=num_rounds, doing="training")
        super().start(title, num_rounds, first_round, clients, history)

    def joined(self, client: int, who: Participant, again: bool) -> None:
        if not again:
            self._names.append(who.name)
        since = f"{'again ' if again else ''}from round {self._facts['round'] + 1}"
        self._note_device(who.name, **_part(who, since), left_out="")
        super().joined(client, who, again)

    def left(self, client: int) -> None:
        during = f"in round {self._facts['round']}" if self.in_round else f"after round {self._facts['round']}"
        self._note_device(self._names[client], takes_part=f"left {during}")
        super().left(client)

    def cannot_join(self, name: str, reason: str) -> None:
        with self._lock:
            self._devices.pop(name, None)  # it takes no part any more
        self._note_device(name, left_out=reason)
        super().cannot_join(name, reason)

    def phase(self, text: str) -> None:
        self._note(doing=text)
        super().phase(text)

    def round_started(self, round: int) -> None:
        self.in_round = True
        self._note(round=round, doing="training")
        super().round_started(round)

    def client_done(self, round: int, client: int, done: ClientRound) -> None:
        left_out = "" if done.status in ("ok", "left") else f"round {round}: {done.status}: {done.reason}"
        self._note_device(self._names[client], left_out=left_out)
        super().client_done(round, client, done)

    def round_done(self, round: int, seconds: float, bytes_down: int, bytes_up: int) -> None:
        self.in_round = False
        super().round_done(round, seconds, bytes_down, bytes_up)

    def __enter__(self) -> Self:
        self.write()
        return self

    def __exit__(self, *_: object) -> None:
        self._board.folder.serving.unlink(missing_ok=True)


def _part(client: Participant, since: str) -> dict[str, Any]:
    return {"rows": client.examples, "budget": client.budget, "takes_part": since}
