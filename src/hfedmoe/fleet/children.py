"""Processes that a command starts and looks after. They end with it, even if it is killed (on Linux)."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from hfedmoe.files.disk import disk_errors
from hfedmoe.fleet.certificates import LOOPBACK

_GRACE_S = 10.0
# A death signal survives exec, but not fork: so the child asks for it, and then becomes the program.
_ENDS_WITH_PARENT = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 15)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def start(
    command: Sequence[str], log: Path | None, extra: Mapping[str, str] | None = None
) -> "subprocess.Popen[bytes]":
    """Start a process in a session of its own, so that Ctrl-C reaches only its parent.

    Args:
        log: the file to which its output is added; None: a pipe.
        extra: added to the environment.

    Raises:
        DiskError: the file cannot be written.
    """
    full = [sys.executable, "-c", _ENDS_WITH_PARENT, str(os.getpid()), *command]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(extra or {})}
    with contextlib.ExitStack() as stack:
        out: int | IO[bytes] = subprocess.PIPE
        if log is not None:
            with disk_errors(log, "start again"):
                out = stack.enter_context(log.open("ab"))
        return subprocess.Popen(
            full,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )


def stop(process: "subprocess.Popen[bytes]", grace_s: float = _GRACE_S) -> None:
    """End a process: politely, then by force."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    """A port on loopback that nobody listens on now."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    """Whether something accepts connections on a port on loopback."""
    with contextlib.closing(socket.socket()) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((LOOPBACK, port)) == 0


def quiet(home: Path) -> dict[str, str]:
    """The environment of Flower's programs: their own folder, no telemetry, no question for updates.

    Raises:
        DiskError: the folder cannot be made.
    """
    with disk_errors(home, "start again"):
        home.mkdir(parents=True, exist_ok=True)
    return {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "NO_COLOR": "1",
    }
