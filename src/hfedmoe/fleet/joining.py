"""`hfedmoe join`: a device that takes part until it is told to leave.

It starts Flower's SuperNode, which talks to the server, and a worker, which trains. It starts them again when they
end, and shows what the worker says.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from hfedmoe.errors import UserError
from hfedmoe.files.disk import disk_errors
from hfedmoe.files.locks import HeldError, claim
from hfedmoe.fleet.allowed import Allowed
from hfedmoe.fleet.certificates import LOOPBACK
from hfedmoe.fleet.children import free_port, quiet, start, stop
from hfedmoe.fleet.deaths import MOST, Deaths
from hfedmoe.fleet.device import AGAIN, DOES_NOT_FIT, DeviceFolder
from hfedmoe.fleet.invite import Invitation, key_of, read_invitation
from hfedmoe.fleet.lean import FRUGAL, lean
from hfedmoe.fleet.offer import TO_CHECK, TO_RUN
from hfedmoe.fleet.reach import NoAnswerError, ask
from hfedmoe.fleet.secret import write_secret
from hfedmoe.fleet.voice import Voice

LOOK_S, AGAIN_S, ASK_S = 0.3, 5.0, 10.0


class LeaveError(Exception):
    """The device's owner wants to leave."""


def join(path: Path, key: Path | None, allowed: Allowed, place: Path) -> int:
    """Take part until Ctrl-C or SIGTERM; returns the exit code.

    Args:
        path: the invitation.
        key: the device's own private key, if the invitation has none.
        place: the folder for log files and memory.

    Raises:
        UserError: the invitation is not valid, the server does not know this device, the folder cannot be used, or the
            worker dies soon after every start.
    """
    invitation = read_invitation(path)
    private = key_of(invitation, key)
    folder = DeviceFolder(place)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_alone(folder))
        stack.enter_context(_leaving())
        with disk_errors(folder.log, "join again"):
            log = stack.enter_context(folder.log.open("ab", buffering=0))
        device = _Joined(folder, invitation, private, Voice(log))
        try:
            device.prepare(path, key, allowed)
            return device.stay()
        except LeaveError:
            folder.asked.unlink(missing_ok=True)  # its owner is here
            device.voice.say(f"{invitation.name} leaves")
            return 0
        finally:
            device.close()


class _Joined:
    """A device with its two processes."""

    def __init__(
        self, folder: DeviceFolder, invitation: Invitation, key: ec.EllipticCurvePrivateKey, voice: Voice
    ) -> None:
        self.folder, self.invitation, self.key, self.voice = folder, invitation, key, voice
        self._port = free_port()
        self._node: subprocess.Popen[bytes] | None = None
        self._worker: subprocess.Popen[bytes] | None = None
        self._deaths = Deaths()
        self._reader: threading.Thread | None = None
        self._asked = time.monotonic()
        self._checked = ""

    def prepare(self, invitation: Path, key: Path | None, allowed: Allowed) -> None:
        """Write the files that the two processes read."""
        folder = self.folder
        with disk_errors(folder.path, "join again"):
            for file in (folder.key, folder.ca, folder.secret, folder.settings, folder.ready):
                file.unlink(missing_ok=True)
        private = self.key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        write_secret(folder.key, private)
        write_secret(folder.ca, self.invitation.ca.encode())
        write_secret(folder.secret, secrets.token_hex(32).encode())
        settings = {
            "invitation": str(invitation.absolute()),
            "key": None if key is None else str(key.absolute()),
            "allowed": allowed.to_json(),
            "port": self._port,
        }
        write_secret(folder.settings, json.dumps(settings).encode())

    def stay(self) -> int:
        """Keep both processes running; returns the exit code if the device does not fit.

        Raises:
            UserError: the worker dies soon after every start, or the server does not know this device any more.
        """
        while True:
            if self._worker is None:
                self._await_run()
                self._start_worker()
            assert self._worker is not None
            time.sleep(LOOK_S)
            code = self._worker.poll()
            if code == DOES_NOT_FIT:
                return 1
            if code is not None:
                worked = self.folder.ready.exists()
                if code != AGAIN and self._deaths.too_many(code, worked):
                    raise UserError(
                        f"the worker ended soon after each of its last {MOST} starts ({_words(code)}); "
                        f"{self.folder.log} says why"
                    )
                self.voice.say(f"the worker ended ({_words(code)}) and is started again")
                self._worker = None
                time.sleep(AGAIN_S)
            elif self._node is not None and self._node.poll() is not None:
                # After a crash the server takes the same key for a while as still connected.
                self.voice.say(f"the connection ended ({_words(self._node.poll())}); trying again")
                self._node = None
                time.sleep(AGAIN_S)
                self._await_run()
            elif self._node is None and self.folder.ready.exists():
                self._start_node()
            elif self._is_to_check():
                self._end()

    def _is_to_check(self) -> bool:
        """Ask the server from time to time whether it wants to know if its devices fit, while it serves no run."""
        if time.monotonic() - self._asked < ASK_S:
            return False
        self._asked = time.monotonic()
        try:
            offer = ask(self.invitation, self.key)
        except UserError:  # the SuperNode finds out
            return False
        return offer.purpose == TO_CHECK and offer.run != self._checked

    def _check(self, run: str) -> None:
        """Say whether this device fits, to its owner and to the server."""
        self._checked = run
        self.voice.say("the server checks its devices")
        self._start_worker("--check")
        assert self._worker is not None
        self._worker.wait()
        self._end()

    def _await_run(self) -> None:
        """Wait until the server serves a run. Raises UserError if it does not know this device."""
        said = ""
        while True:
            try:
                offer = ask(self.invitation, self.key)
                if offer.purpose == TO_RUN:
                    return
                if offer.run != self._checked:
                    self._end()
                    self._check(offer.run)
                time.sleep(AGAIN_S)
            except NoAnswerError as error:
                if str(error) != said:
                    said = str(error)
                    self.voice.say(f"waiting: {said}")
                time.sleep(AGAIN_S)

    def _start_worker(self, *options: str) -> None:
        self.folder.ready.unlink(missing_ok=True)
        command = [sys.executable, "-m", "hfedmoe.fleet.worker", str(self.folder.path), *options]
        self._worker = start(command, None, quiet(self.folder.path / "flwr"))
        self._deaths.started()
        self._reader = threading.Thread(target=self._relay, args=(self._worker.stdout,), daemon=True)
        self._reader.start()

    def _relay(self, lines: IO[bytes]) -> None:
        for line in lines:
            self.voice.say(line.decode("utf-8", "replace").rstrip())

    def _start_node(self) -> None:
        folder = self.folder
        command = [*lean("flower-supernode"), "--superlink", self.invitation.address]
        command += ["--root-certificates", str(folder.ca), "--auth-supernode-private-key", str(folder.key)]
        command += ["--isolation", "process", "--superexec-auth-secret-file", str(folder.secret)]
        command += ["--host", LOOPBACK, "--port", str(self._port)]
        command += ["--node-config", f"partition-id={self.invitation.number}"]
        self._node = start(command, folder.node_log, quiet(folder.path / "flwr") | FRUGAL)
        self.voice.say(f"{self.invitation.name} is connected to {self.invitation.address}")

    def _end(self) -> None:
        """End both processes; the SuperNode tells the server that it leaves."""
        for process in (self._node, self._worker):
            if process is not None:
                stop(process)
        if self._reader is not None:
            self._reader.join()
        self._node = self._worker = self._reader = None

    def close(self) -> None:
        """End both processes, and remove what only they need."""
        self._end()
        for file in (self.folder.ready, self.folder.key, self.folder.secret):
            file.unlink(missing_ok=True)


def _words(code: int | None) -> str:
    if code is None:
        return "running"
    if code == -signal.SIGKILL:
        return "killed, perhaps because the memory was full"
    return f"signal {-code}" if code < 0 else f"code {code}"


@contextlib.contextmanager
def _alone(folder: DeviceFolder) -> Iterator[None]:
    """Use the folder in this process only. Raises UserError if another one does, or it cannot be written."""
    with disk_errors(folder.path, "join again"):
        folder.path.mkdir(parents=True, exist_ok=True)
        os.chmod(folder.path, 0o700)
        lock = (folder.path / "lock").open("ab")
    with lock:
        try:
            claim(lock.fileno())
        except HeldError:
            raise UserError(f"{folder.path}: this device has joined already, in another process") from None
        yield


@contextlib.contextmanager
def _leaving() -> Iterator[None]:
    """During the block, Ctrl-C and SIGTERM raise LeaveError, once."""

    def leave(_: int, __: FrameType | None) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        raise LeaveError

    before = [(number, signal.signal(number, leave)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
