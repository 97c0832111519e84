"""A small program between a process and a command that runs under a memory limit; see `limits.run_limited`.

It runs as a file, in a Python without site packages, so it imports nothing from hfedmoe.
"""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

resource: Any
try:
    import resource
except ImportError:  # Windows
    resource = None

_AGAIN_S = 0.05


def launch(order: dict[str, Any]) -> None:
    """The launcher: fork a process, limit its memory, let it become the command, and report how it ended."""
    folder = order["group"] and Path(order["group"])
    os.set_inheritable(order["report"], False)
    timed_out = interrupted = False
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until there is a child to pass it to
    pid = os.fork()
    if pid == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        _become(order["command"], folder, order["limit_bytes"])

    def stop(number: int, _: object) -> None:
        nonlocal timed_out, interrupted
        if number == signal.SIGTERM:
            interrupted = True
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S, _AGAIN_S)
        timed_out = timed_out or not interrupted
        kill_all(folder, pid)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGALRM, stop)
    with contextlib.suppress(PermissionError):  # the child did it itself and is already the command
        os.setpgid(pid, pid)
    # Timers repeat: at the first signal the forked process may not be in its control group yet.
    if order["timeout_s"] is not None:
        signal.setitimer(signal.ITIMER_REAL, max(order["timeout_s"], 1e-3), _AGAIN_S)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    _, status, usage = os.wait4(pid, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    kill_all(folder, pid)
    report = {
        "returncode": os.waitstatus_to_exitcode(status),
        "peak_bytes": usage.ru_maxrss * 1024,
        "timed_out": timed_out,
    }
    os.write(order["report"], json.dumps(report).encode())


def _become(command: list[str], folder: Path | None, limit_bytes: int) -> NoReturn:
    """In the forked process: set the limit, and exec."""
    try:
        os.setpgid(0, 0)
        if folder is not None:
            (folder / "cgroup.procs").write_text(str(os.getpid()))
        else:
            limit_data(limit_bytes, for_good=True)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and exec would keep that
            signal.signal(number, signal.SIG_DFL)
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        sys.stderr.flush()
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)  # as shells do


def kill_all(folder: Path | None, leader: int = 0) -> None:
    """Kill the processes of the control group, or else of the process group of `leader`."""
    if folder is not None:
        for pid in (folder / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):  # it has already ended
                os.kill(int(pid), signal.SIGKILL)
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)


def limit_data(limit_bytes: int, for_good: bool) -> None:
    """Set RLIMIT_DATA of this process, never above its hard limit; `for_good`: it cannot be raised again."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit if for_good else hard))


if __name__ == "__main__":
    launch(json.loads(sys.argv[1]))
