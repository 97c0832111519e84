"""Run a command under a memory limit that the operating system enforces, and report how it ended. Linux only.

From a shell: `python -m hfedmoe.device.limits 4GiB -- hfedmoe run my.toml`.

There are two ways. A *cgroup* (needs root) limits the memory of the command and all its processes together, page cache
included, and prevents swapping; beyond the limit the kernel kills a process. *rlimit* (any user) sets RLIMIT_DATA,
which limits the private writable memory of each process; beyond it comes a MemoryError. Read-only file mappings do not
count there.
"""

import argparse
import contextlib
import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from hfedmoe.device import launcher as bare
from hfedmoe.device.cgroups import limited_group
from hfedmoe.device.launcher import limit_data
from hfedmoe.device.rlimits import resource

WAYS = ("auto", "cgroup", "rlimit")


@dataclass(frozen=True)
class LimitedRun:
    """How a command ended under its limit."""

    returncode: int
    """As in `subprocess`: negative for the signal that ended it; 126 or 127 if it could not be started."""
    stdout: str
    stderr: str
    peak_bytes: int
    """Peak resident memory of the command's process, or of the largest child that it waited for. It may be a little
    above the limit: pages of libraries that another process loaded first count for that process."""
    killed: bool
    """cgroup: the kernel killed a process of the command because memory ran out. rlimit: a signal ended the command. A
    command that handles the failed allocation (in Python, a MemoryError) is not killed: see its return code."""
    how: str
    """"cgroup" or "rlimit"."""
    group_peak_bytes: int | None = None
    """Peak of all the command's processes together with their page cache; None if the system does not report it."""
    timed_out: bool = False


def why_no_cgroup() -> str | None:
    """Why this process cannot limit a command by a cgroup; None if it can."""
    try:
        with limited_group(1 << 30):
            return None
    except OSError as error:
        return str(error)


def hold_process_to(limit_bytes: int | None) -> bool:
    """Limit the private memory of this process from now on; returns whether the system can (Linux).

    None removes the limit of earlier calls.

    If its budget was planned wrongly, a device then gets a memory error, which it reports and learns from. Without the
    limit it would take memory that other programs on the machine need.
    """
    if resource is None or not sys.platform.startswith("linux"):
        return False
    global _soft_before
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if limit_bytes is not None:
        _soft_before = soft if _soft_before is None else _soft_before
        limit_data(limit_bytes, for_good=False)
    elif _soft_before is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (_soft_before, hard))
        _soft_before = None
    return True


_soft_before: int | None = None
"""RLIMIT_DATA of this process before `hold_process_to`, while its limit is set."""


def run_limited(
    command: list[str],
    limit_bytes: int,
    env: dict[str, str] | None = None,
    timeout_s: float | None = None,
    how: str = "auto",
    capture: bool = True,
) -> LimitedRun:
    """Run `command` under a memory limit of `limit_bytes` and wait for it; it gets no standard input.

    When its first process ends, or after `timeout_s`, everything that it started is killed. `env` replaces the
    environment. `how` is "cgroup", "rlimit", or "auto": a cgroup if possible. Without `capture` the command
    writes to this process's own output, and `stdout` and `stderr` stay empty.

    Raises:
        OSError: the limit cannot be set here (not Linux; "cgroup" without the rights or the controller).
        ValueError: `how` is unknown, or the limit is not positive.
    """
    if how not in WAYS or limit_bytes <= 0:
        raise ValueError(f"how={how!r} (expected one of {', '.join(WAYS)}), limit_bytes={limit_bytes}")
    if resource is None or not sys.platform.startswith("linux"):
        raise OSError(errno.ENOSYS, "memory limits need Linux")
    if how == "auto":
        how = "rlimit" if why_no_cgroup() else "cgroup"
    with limited_group(limit_bytes) if how == "cgroup" else contextlib.nullcontext() as group:
        order = {
            "command": command,
            "group": None if group is None else str(group.folder),
            "limit_bytes": limit_bytes,
            "timeout_s": timeout_s,
        }
        report, stdout, stderr = _in_launcher(order, env, capture)
        if group is None:
            killed, group_peak = report["returncode"] < 0 and not report["timed_out"], None
        else:
            killed, group_peak = bool(group.oom_kills), group.peak_bytes
    return LimitedRun(
        returncode=report["returncode"],
        stdout=stdout,
        stderr=stderr,
        peak_bytes=report["peak_bytes"],
        killed=killed,
        how=how,
        group_peak_bytes=group_peak,
        timed_out=report["timed_out"],
    )


def _in_launcher(order: dict[str, Any], env: dict[str, str] | None, capture: bool) -> tuple[dict[str, Any], str, str]:
    """Let a launcher run the command; returns its report and the command's stdout and stderr.

    The launcher is a small Python process (12 MB) between this process and the command. It is needed because the peak
    that the kernel reports for a process (ru_maxrss) starts at that of its parent, even after exec.
    """
    reading, writing = os.pipe()
    pipe = subprocess.PIPE if capture else None
    try:
        launcher = subprocess.Popen(
            [sys.executable, "-I", "-S", bare.__file__, json.dumps(order | {"report": writing})],
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            env=env,
            text=True,
            errors="replace",
            pass_fds=[writing],
            start_new_session=True,  # an interrupt from the keyboard reaches this process only, which passes it on
        )
    finally:
        os.close(writing)
    with open(reading, encoding="utf-8") as report, launcher:
        try:
            stdout, stderr = launcher.communicate()
        except BaseException:
            launcher.terminate()  # it also kills the command
            raise
        text = report.read()
    if not text:
        raise OSError(errno.EIO, f"the launcher failed: {stderr or f'exit code {launcher.returncode}'}")
    result: dict[str, Any] = json.loads(text)
    return result, stdout or "", stderr or ""


def main(arguments: list[str]) -> int:
    """The command line; returns the command's exit code, as a shell would."""
    from hfedmoe.config.budgets import parse_bytes

    parser = argparse.ArgumentParser("python -m hfedmoe.device.limits", description=__doc__.split("\n")[0])
    parser.add_argument("limit", help='memory, such as "4GiB"')
    parser.add_argument("--how", choices=WAYS, default="auto")
    parser.add_argument("--timeout", type=float, metavar="SECONDS")
    parser.add_argument("command", nargs="+", help="after --")
    options = parser.parse_args(arguments)
    try:
        limit = parse_bytes(options.limit)
        run = run_limited(options.command, limit, timeout_s=options.timeout, how=options.how, capture=False)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    ended = "timed out" if run.timed_out else "killed" if run.killed else f"exit code {run.returncode}"
    peaks = f"peak {run.peak_bytes / 2**20:,.0f} MiB"
    if run.group_peak_bytes is not None:
        peaks += f", {run.group_peak_bytes / 2**20:,.0f} MiB with page cache"
    print(f"{ended}; {peaks}; limit {limit / 2**20:,.0f} MiB ({run.how})", file=sys.stderr)
    return 124 if run.timed_out else run.returncode if run.returncode >= 0 else 128 - run.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
