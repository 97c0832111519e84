"""A note on the device's disk that shows, after a restart, that the process was killed for its memory.

The system's out-of-memory killer leaves no time to report. So a device writes a note before each attempt (one small
JSON file, `{"task": "...", "doing": "train", "experts": 16, "kills": {...}}`), and deletes it when the attempt ends,
also with an error. A note that is found later means that the attempt was cut off: by a kill for memory if the system
has counted one since (`device.kills`), else by somebody or something that says nothing about the budget.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from hfedmoe.device.kills import Kills, killed_for_memory, kills_now
from hfedmoe.files.disk import replacing

logger = logging.getLogger(__name__)
DOINGS = ("plan", "train", "measure", "tune")


@dataclass(frozen=True)
class Attempt:
    """What a device was doing: `doing` is one of `DOINGS`, `experts` the number to hold over all layers."""

    task: str
    """Names model and workload; a note of another task says nothing about this one."""
    doing: str
    experts: int
    kills: Kills | None
    """When it began; None: the system counts none."""


class Note:
    """The note of one device; with path None, nothing is written or found.

    A note that cannot be read or written gives a warning, not an error: the device then learns nothing from a kill.
    """

    def __init__(self, path: Path | None, task: str) -> None:
        self.path, self.task = path, task

    @contextmanager
    def attempting(self, doing: str, experts: int) -> Iterator[None]:
        """Keep the note on the disk while the block runs."""
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(self.path) as file:
                    file.write(json.dumps(asdict(Attempt(self.task, doing, experts, kills_now()))).encode())
            except OSError as error:
                logger.warning("%s: cannot be written (%s); a kill would not be noticed", self.path, error)
        try:
            yield
        finally:
            self._clear()

    def take_killed(self) -> Attempt | None:
        """The attempt that was killed for its memory, if one was; the note is gone afterwards.

        Decision: where the system counts no kills (not Linux), none is taken as one for memory. Such a device is left
        out of a round each time, and its owner gives it a smaller budget.
        """
        if self.path is None:
            return None
        try:
            attempt = _parse(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("%s: cannot be read and is ignored (%s)", self.path, error)
            attempt = None
        self._clear()
        if attempt is not None and attempt.task != self.task:
            logger.warning("%s: left by another task and ignored", self.path)
            return None
        if attempt is not None and not killed_for_memory(attempt.kills, kills_now()):
            logger.warning("the last attempt was cut off, but not for its memory as far as the system says")
            return None
        return attempt

    def _clear(self) -> None:
        if self.path is None:
            return
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s: cannot be deleted (%s)", self.path, error)


def _parse(data: bytes) -> Attempt:
    """Raises ValueError."""
    tree = json.loads(data)
    if not isinstance(tree, dict) or set(tree) != set(Attempt.__dataclass_fields__):
        raise ValueError("not a note of an attempt")
    kills = tree["kills"]
    attempt = Attempt(**tree | {"kills": None if kills is None else Kills.from_json(kills)})
    whole = isinstance(attempt.experts, int) and not isinstance(attempt.experts, bool) and attempt.experts > 0
    if not whole or attempt.doing not in DOINGS or not isinstance(attempt.task, str):
        raise ValueError("not a note of an attempt")
    return attempt
