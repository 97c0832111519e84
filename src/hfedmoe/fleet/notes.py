"""What a server is doing now, in `serving.json`, for `hfedmoe status` and `hfedmoe stop`."""

import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from hfedmoe.events import ClientRound, Evaluation, Forwarding, Participant, Watcher
from hfedmoe.files.disk import replacing
from hfedmoe.fleet.front import Board


class Notes(Forwarding):
    """Passes events on to another watcher, and notes what `status` shows."""

    def __init__(self, inner: Watcher, board: Board, run: Path) -> None:
        super().__init__(inner)
        self._board = board
        self._lock = threading.Lock()
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
        """Write the file. Called from several threads."""
        with self._lock:
            devices = {}
            for device in self._board.invited().values():
                seen = self._board.seen.get(device.name)
                devices[device.name] = {
                    "seen": None if seen is None else round(seen.at, 1),
                    "versions": "" if seen is None else seen.versions,
                    **self._devices.get(device.name, {}),
                }
            with replacing(self._board.folder.serving) as stream:
                stream.write(json.dumps(self._facts | {"at": time.time(), "devices": devices}).encode())

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
        for client in clients:
            self._takes_part(client, f"from round {first_round}")
        self._note(round=first_round - 1, rounds=num_rounds, doing="training")
        super().start(title, num_rounds, first_round, clients, history)

    def _takes_part(self, client: Participant, since: str) -> None:
        self._devices[client.name] = {"rows": client.examples, "budget": client.budget, "takes_part": since}

    def joined(self, client: int, who: Participant, again: bool) -> None:
        if not again:
            self._names.append(who.name)
        self._takes_part(who, f"{'again ' if again else ''}from round {self._facts['round'] + 1}")
        self.write()
        super().joined(client, who, again)

    def left(self, client: int) -> None:
        during = f"in round {self._facts['round']}" if self.in_round else f"after round {self._facts['round']}"
        self._devices.setdefault(self._names[client], {})["takes_part"] = f"left {during}"
        self.write()
        super().left(client)

    def cannot_join(self, name: str, reason: str) -> None:
        self._devices[name] = {"left_out": reason}
        self.write()
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
        self._devices.setdefault(self._names[client], {})["left_out"] = left_out
        self.write()
        super().client_done(round, client, done)

    def round_done(self, round: int, seconds: float, bytes_down: int, bytes_up: int) -> None:
        self.in_round = False
        super().round_done(round, seconds, bytes_down, bytes_up)

    def __enter__(self) -> Self:
        self.write()
        return self

    def __exit__(self, *_: object) -> None:
        self._board.folder.serving.unlink(missing_ok=True)
