"""What a server is doing now, in `serving.json`, for `hfedmoe status` and `hfedmoe stop`."""

import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from hfedmoe.events import ClientRound, ClientTotals, Evaluation, Participant, Watcher
from hfedmoe.files.disk import replacing
from hfedmoe.fleet.front import Board


class Notes(Watcher):
    """Passes events on to another watcher, and notes what `status` shows."""

    def __init__(self, inner: Watcher, board: Board, run: Path) -> None:
        self._inner, self._board = inner, board
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
            self._devices[client.name] = {"rows": client.examples, "budget": client.budget}
        self._note(rounds=num_rounds, doing="training")
        self._inner.start(title, num_rounds, first_round, clients, history)

    def cannot_join(self, name: str, reason: str) -> None:
        self._devices[name] = {"left_out": reason}
        self.write()
        self._inner.cannot_join(name, reason)

    def phase(self, text: str) -> None:
        self._note(doing=text)
        self._inner.phase(text)

    def round_started(self, round: int) -> None:
        self.in_round = True
        self._note(round=round, doing="training")
        self._inner.round_started(round)

    def client_started(self, round: int, client: int, steps: int) -> None:
        self._inner.client_started(round, client, steps)

    def step(self, client: int, step: int, steps: int, loss: float) -> None:
        self._inner.step(client, step, steps, loss)

    def client_experts(self, round: int, client: int, held: Sequence[bool], trained: Sequence[bool]) -> None:
        self._inner.client_experts(round, client, held, trained)

    def client_done(self, round: int, client: int, done: ClientRound) -> None:
        left_out = "" if done.status == "ok" else f"round {round}: {done.status}: {done.reason}"
        self._devices.setdefault(self._names[client], {})["left_out"] = left_out
        self.write()
        self._inner.client_done(round, client, done)

    def evaluating(self, done: int, total: int) -> None:
        self._inner.evaluating(done, total)

    def evaluated(self, evaluation: Evaluation) -> None:
        self._inner.evaluated(evaluation)

    def round_done(self, round: int, seconds: float, bytes_down: int, bytes_up: int) -> None:
        self.in_round = False
        self._inner.round_done(round, seconds, bytes_down, bytes_up)

    def warning(self, text: str) -> None:
        self._inner.warning(text)

    def finish(self, text: str) -> None:
        self._inner.finish(text)

    def final_table(self, clients: Sequence[ClientTotals], before: Evaluation | None, after: Evaluation | None) -> None:
        self._inner.final_table(clients, before, after)

    def __enter__(self) -> Self:
        self.write()
        return self

    def __exit__(self, *_: object) -> None:
        self._board.folder.serving.unlink(missing_ok=True)
