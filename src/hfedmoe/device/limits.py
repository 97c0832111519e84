"""Run a command under a memory limit that the operating system enforces, and say how it went. Linux only.

From a shell: `python -m hfedmoe.device.limits 4GiB -- hfedmoe run my.toml`.

Two ways. A *cgroup* (root) limits what the command and all its processes really hold, page cache included, and keeps
it from swapping; going beyond it is death. *rlimit* (any user) sets RLIMIT_DATA, which bounds the private writable
memory of each process; going beyond it is a MemoryError, and file-backed read-only mappings do not count.
"""

import argparse
import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

# Nothing of hfedmoe is imported up here: this file is also run bare, as the launcher below.

WAYS = ("auto", "cgroup", "rlimit")


@dataclass(frozen=True)
class LimitedRun:
    """How a command went under its limit."""

    returncode: int
    """As in `subprocess`: negative for the signal that ended it; 126 or 127 if it could not be started."""
    stdout: str
    stderr: str
    peak_bytes: int
    """Peak resident memory of the command's process, or of the largest child that it waited for. It may lie a little
    above the limit: pages of libraries that another process loaded first are charged to that one."""
    killed: bool
    """cgroup: the kernel killed a process of the command for want of memory. rlimit: a signal ended the command (a
    command that handles the refusal, such as Python with its MemoryError, is not killed: see its return code)."""
    how: str
    """"cgroup" or "rlimit"."""
    group_peak_bytes: int | None = None
    """Peak of all the command's processes together with their page cache; None where the system does not say."""
    timed_out: bool = False


@dataclass(frozen=True)
class MemoryGroup:
    """A control group of the memory controller, version 1 or 2."""

    folder: Path
    version: int

    def read(self, name: str) -> int | None:
        """A file with one number; None where there is no such file or it says "max"."""
        try:
            text = (self.folder / name).read_text().strip()
        except FileNotFoundError:
            return None
        return None if text == "max" else int(text)

    def fields(self, name: str) -> dict[str, int]:
        """A file with a `key number` pair per line; empty where there is no such file."""
        try:
            lines = (self.folder / name).read_text().splitlines()
        except FileNotFoundError:
            return {}
        return {key: int(value) for key, value in (line.split() for line in lines)}

    @property
    def limit_bytes(self) -> int | None:
        """What the group may hold; None where that is not limited."""
        limit = self.read("memory.max" if self.version == 2 else "memory.limit_in_bytes")
        return None if limit is None or limit >= 1 << 62 else limit  # version 1 writes "none" as almost 2^63

    @property
    def held_bytes(self) -> int:
        """What the group holds and the kernel cannot drop: its usage without the cache of files."""
        usage = self.read("memory.current" if self.version == 2 else "memory.usage_in_bytes") or 0
        prefix = "" if self.version == 2 else "total_"  # with the groups below
        stat = self.fields("memory.stat")
        return max(0, usage - sum(stat.get(f"{prefix}{part}_file", 0) for part in ("active", "inactive")))

    @property
    def peak_bytes(self) -> int | None:
        """The most that the group has held, page cache included; None before Linux 5.19 with version 2."""
        return self.read("memory.peak" if self.version == 2 else "memory.max_usage_in_bytes")

    @property
    def oom_kills(self) -> int:
        """Processes of the group that the kernel has killed for want of memory."""
        return self.fields("memory.events" if self.version == 2 else "memory.oom_control").get("oom_kill", 0)

    def set_limit(self, limit_bytes: int) -> None:
        """Limit memory, and swap to nothing beside it where the kernel accounts for swap."""
        memory, swap, swap_bytes = "memory.max", "memory.swap.max", 0
        if self.version == 1:  # there the second is memory and swap together
            memory, swap, swap_bytes = "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", limit_bytes
        (self.folder / memory).write_text(str(limit_bytes))
        if (self.folder / swap).exists():
            (self.folder / swap).write_text(str(swap_bytes))

    def kill(self) -> None:
        """Kill every process of the group."""
        _kill_all(self.folder)

    def remove(self, patience_s: float = 5.0) -> None:
        """Kill what is left in the group and remove it. Raises OSError if it cannot be emptied."""
        deadline = time.monotonic() + patience_s
        while True:
            self.kill()
            try:
                return self.folder.rmdir()
            except OSError as error:  # a killed process leaves its group a moment later
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
            time.sleep(0.01)


def memory_groups(proc: Path = Path("/proc/self")) -> list[MemoryGroup]:
    """The memory control groups that hold this process, its own first, then each one above; empty without any.

    `proc` is the process's folder with `cgroup` and `mountinfo` (see cgroups(7) and proc_pid_mountinfo(5)).
    """
    try:
        memberships = (proc / "cgroup").read_text().splitlines()
        mounts = (proc / "mountinfo").read_text().splitlines()
    except OSError:  # not Linux, or a /proc without these files
        return []
    found: list[MemoryGroup] = []
    for version in (1, 2):
        own = next((path for line in memberships if (path := _membership(line, version)) is not None), None)
        mount = next((place for line in mounts if (place := _mount(line, version)) is not None), None)
        if own is None or mount is None:
            continue
        root, top = mount
        controllers = top / "cgroup.controllers"
        if version == 2 and not (controllers.exists() and "memory" in controllers.read_text().split()):
            continue  # mounted beside version 1, which has the memory controller
        # In a container the mount may show a part of the tree only: what is above or beside it cannot be seen.
        seen = ".." not in Path(own).parts and Path(own).is_relative_to(root)
        folder = top / Path(own).relative_to(root) if seen else top
        found += [MemoryGroup(place, version) for place in (folder, *folder.parents) if place.is_relative_to(top)]
    return found


def _membership(line: str, version: int) -> str | None:
    """The path in a line of /proc/PID/cgroup (`4:memory:/a`, or `0::/a` for version 2), if it is the wanted one."""
    _, controllers, path = line.split(":", 2)
    wanted = controllers == "" if version == 2 else "memory" in controllers.split(",")
    return path if wanted else None


def _mount(line: str, version: int) -> tuple[str, Path] | None:
    """The group shown at the mount point, and the mount point, in a line of /proc/PID/mountinfo, if it is the one."""
    place, _, kind = line.partition(" - ")
    root, point = (re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), field) for field in place.split()[3:5])
    system, _, options = kind.split(" ", 2)
    wanted = system == "cgroup2" if version == 2 else system == "cgroup" and "memory" in options.split(",")
    return (root, Path(point)) if wanted else None


def why_no_cgroup() -> str | None:
    """Why this process cannot limit a command by a cgroup; None if it can."""
    try:
        with _limited_group(1 << 30):
            return None
    except OSError as error:
        return str(error)


def hold_process_to(limit_bytes: int | None) -> bool:
    """Refuse this process more private memory than this from now on; returns whether the system can (Linux).

    None takes back what earlier calls set.

    A device with a budget that was planned wrongly then runs out of memory inside, which it reports and learns from,
    instead of taking what other programs on the machine need.
    """
    if not sys.platform.startswith("linux"):
        return False
    import resource

    global _soft_before
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if limit_bytes is not None:
        _soft_before = soft if _soft_before is None else _soft_before
        _limit_data(limit_bytes, for_good=False)
    elif _soft_before is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (_soft_before, hard))
        _soft_before = None
    return True


_soft_before: int | None = None
"""RLIMIT_DATA of this process before `hold_process_to`, while that holds."""


def _limit_data(limit_bytes: int, for_good: bool) -> None:
    """Set RLIMIT_DATA of this process, never above what it may have; `for_good`: it cannot raise it again."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit if for_good else hard))


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
    environment. `how` is "cgroup", "rlimit", or "auto": a cgroup if that is possible. Without `capture` the command
    writes to this process's own output, and `stdout` and `stderr` stay empty.

    Raises:
        OSError: the limit cannot be set here (not Linux; "cgroup" without the rights or the controller).
        ValueError: `how` is none of the three, or the limit is not positive.
    """
    if how not in WAYS or limit_bytes <= 0:
        raise ValueError(f"how={how!r} (expected one of {', '.join(WAYS)}), limit_bytes={limit_bytes}")
    if not sys.platform.startswith("linux"):
        raise OSError(errno.ENOSYS, "memory limits need Linux")
    if how == "auto":
        how = "rlimit" if why_no_cgroup() else "cgroup"
    with _limited_group(limit_bytes) if how == "cgroup" else contextlib.nullcontext() as group:
        order = {
            "command": command,
            "group": None if group is None else str(group.folder),
            "limit_bytes": limit_bytes,
            "timeout_s": timeout_s,
        }
        report, stdout, stderr = _in_launcher(order, env, capture)
        out_of_memory = report["returncode"] < 0 and not report["timed_out"] if group is None else group.oom_kills > 0
        group_peak = None if group is None else group.peak_bytes
    return LimitedRun(
        returncode=report["returncode"],
        stdout=stdout,
        stderr=stderr,
        peak_bytes=report["peak_bytes"],
        killed=out_of_memory,
        how=how,
        group_peak_bytes=group_peak,
        timed_out=report["timed_out"],
    )


@contextlib.contextmanager
def _limited_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """A new group with a limit, gone afterwards. Raises OSError where that is not possible."""
    parent = _parent()
    group = MemoryGroup(Path(tempfile.mkdtemp(prefix="hfedmoe-", dir=parent.folder)), parent.version)
    try:
        group.set_limit(limit_bytes)
        yield group
    finally:
        group.remove()


def _parent() -> MemoryGroup:
    """Where to make a group, such that every limit of this process also holds for it. Raises OSError."""
    for group in memory_groups():
        if group.version == 1:
            return group
        # With version 2 a group with processes gives no controllers to groups below it: go up to one that does.
        if "memory" in (group.folder / "cgroup.subtree_control").read_text().split():
            return group
        if group.limit_bytes is not None:
            raise OSError(errno.EPERM, f"a group beside {group.folder} would escape its limit")
    raise OSError(errno.ENOENT, "no cgroup with the memory controller can be used")


def _in_launcher(order: dict[str, Any], env: dict[str, str] | None, capture: bool) -> tuple[dict[str, Any], str, str]:
    """Have a launcher run the command; its report, and what the command printed.

    The launcher is a bare Python of some 12 MB between this process and the command, because the peak that the kernel
    reports for a process (ru_maxrss) starts at that of the process it was forked from, even after exec.
    """
    reading, writing = os.pipe()
    pipe = subprocess.PIPE if capture else None
    try:
        launcher = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, _LAUNCH, json.dumps(order | {"report": writing})],
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
            launcher.terminate()  # it takes the command with it
            raise
        text = report.read()
    if not text:
        raise OSError(errno.EIO, f"the launcher failed: {stderr or f'exit code {launcher.returncode}'}")
    result: dict[str, Any] = json.loads(text)
    return result, stdout or "", stderr or ""


_LAUNCH = "--launch"
_AGAIN_S = 0.05


def _launch(order: dict[str, Any]) -> None:
    """The launcher: put a forked process under the limit, let it become the command, report how it ended."""
    folder = order["group"] and Path(order["group"])
    os.set_inheritable(order["report"], False)
    timed_out = False
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until there is somebody to pass it on to
    pid = os.fork()
    if pid == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        _become(order["command"], folder, order["limit_bytes"])

    def stop(number: int, _: object) -> None:
        nonlocal timed_out
        timed_out = timed_out or number == signal.SIGALRM
        _kill_all(folder, pid)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGALRM, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    with contextlib.suppress(PermissionError):  # it has done so itself, and is the command by now
        os.setpgid(pid, pid)
    if order["timeout_s"] is not None:
        # Again and again: the first time the forked process may not be in its group yet.
        signal.setitimer(signal.ITIMER_REAL, max(order["timeout_s"], 1e-3), _AGAIN_S)
    _, status, usage = os.wait4(pid, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    _kill_all(folder, pid)
    report = {
        "returncode": os.waitstatus_to_exitcode(status),
        "peak_bytes": usage.ru_maxrss * 1024,
        "timed_out": timed_out,
    }
    os.write(order["report"], json.dumps(report).encode())


def _become(command: list[str], folder: Path | None, limit_bytes: int) -> NoReturn:
    """In the forked process: take the limit, and exec."""
    try:
        os.setpgid(0, 0)
        if folder is not None:
            (folder / "cgroup.procs").write_text(str(os.getpid()))
        else:
            _limit_data(limit_bytes, for_good=True)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and exec would hand that on
            signal.signal(number, signal.SIG_DFL)
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        sys.stderr.flush()
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)  # as shells do


def _kill_all(folder: Path | None, leader: int = 0) -> None:
    """Kill the processes of the control group, or else of the process group of `leader`."""
    if folder is not None:
        for pid in (folder / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):  # it went by itself
                os.kill(int(pid), signal.SIGKILL)
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)


def main(arguments: list[str]) -> int:
    """The command line; returns the command's exit code, as a shell would."""
    from hfedmoe.device.budgets import parse_bytes

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
    if sys.argv[1:2] == [_LAUNCH]:
        _launch(json.loads(sys.argv[2]))
    else:
        sys.exit(main(sys.argv[1:]))
