"""What a device remembers of a run, on its own disk: it survives a restart of the device and of the server.

Flower keeps a client's state only while its processes live. Here it is kept by the run's key, with a copy from before
each of the last rounds: a server that goes on from a checkpoint may ask for a round again, and gets the same answer.
What `client.lasting` names is never taken back.
"""

import re
import shutil
from pathlib import Path

from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Stored
from google.protobuf.message import DecodeError

from hfedmoe.client.lasting import restore
from hfedmoe.errors import UserError
from hfedmoe.files.disk import disk_errors, replacing

KEY = re.compile(r"[0-9a-f]{32}")
NOW, BEFORE = "now", "before-"
ROUNDS, RUNS = 3, 8
"""Rounds and runs that are kept."""


class RunMemory:
    """What a device remembers of one run.

    Args:
        folder: of all runs.
        run: the run's key, from the server.

    Raises:
        UserError: the key is none.
    """

    def __init__(self, folder: Path, run: str) -> None:
        if not KEY.fullmatch(run):
            raise UserError("the server's key of the run is not valid")
        self._path = folder / run

    def recall(self, round: int | None = None, plans: bool = False) -> RecordDict:
        """The state at the beginning of a message.

        Args:
            round: the round that the message belongs to, so that the same round can begin again; None: to none.
            plans: the message asks what the device will hold, with which a round begins, perhaps again. Without, it
                goes on with its round, or begins one that was planned with the round before.

        Raises:
            DiskError: the disk is full.
            UserError: what is remembered is damaged.
        """
        if round is None:
            return self._read(NOW)
        begun = sorted(number for number in self._begun() if number >= round)
        if round in begun and not plans:
            return self._read(NOW)
        # With a later one, the server goes on from an earlier round than this device.
        state = self._read(f"{BEFORE}{begun[0]}" if begun else NOW)
        if begun:
            restore(state, self._read(NOW))
        self._write(f"{BEFORE}{round}", state)
        for number in self._begun():
            if number > round or number <= round - ROUNDS:
                (self._path / f"{BEFORE}{number}").unlink()
        return state

    def keep(self, state: RecordDict) -> None:
        """Write the state after a message. Raises DiskError if the disk is full."""
        self._write(NOW, state)

    def _begun(self) -> list[int]:
        return [int(file.name.removeprefix(BEFORE)) for file in self._path.glob(f"{BEFORE}*")]

    def _read(self, name: str) -> RecordDict:
        try:
            stored = Stored()
            stored.ParseFromString((self._path / name).read_bytes())
            return recorddict_from_proto(stored)
        except FileNotFoundError:
            return RecordDict()
        except (OSError, DecodeError, ValueError) as error:
            raise UserError(f"{self._path / name}: is damaged ({error}); delete {self._path} to begin anew") from None

    def _write(self, name: str, state: RecordDict) -> None:
        with disk_errors(self._path, "start the device again"):
            if not self._path.is_dir():
                self._path.mkdir(parents=True)
                _drop_old(self._path.parent)
            with replacing(self._path / name) as stream:
                stream.write(recorddict_to_proto(state).SerializeToString())


def _drop_old(folder: Path) -> None:
    runs = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in runs[RUNS:]:
        shutil.rmtree(path, ignore_errors=True)
