"""Control groups of the memory controller, versions 1 and 2: those of this process, and new ones with a limit."""

import contextlib
import errno
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hfedmoe.device.launcher import kill_all


@dataclass(frozen=True)
class MemoryGroup:
    """A control group of the memory controller, version 1 or 2."""

    folder: Path
    version: int

    def read(self, name: str) -> int | None:
        """The number in a file; None if the file is missing or says "max"."""
        try:
            text = (self.folder / name).read_text().strip()
        except FileNotFoundError:
            return None
        return None if text == "max" else int(text)

    def fields(self, name: str) -> dict[str, int]:
        """The `key number` pairs in a file, one per line; empty if the file is missing."""
        try:
            lines = (self.folder / name).read_text().splitlines()
        except FileNotFoundError:
            return {}
        return {key: int(value) for key, value in (line.split() for line in lines)}

    @property
    def limit_bytes(self) -> int | None:
        """The limit of the group; None if it has none."""
        limit = self.read("memory.max" if self.version == 2 else "memory.limit_in_bytes")
        return None if limit is None or limit >= 1 << 62 else limit  # version 1 writes "none" as almost 2^63

    @property
    def held_bytes(self) -> int:
        """Memory of the group that the kernel cannot drop: its usage without the cache of files."""
        usage = self.read("memory.current" if self.version == 2 else "memory.usage_in_bytes") or 0
        prefix = "" if self.version == 2 else "total_"  # includes the groups below
        stat = self.fields("memory.stat")
        return max(0, usage - sum(stat.get(f"{prefix}{part}_file", 0) for part in ("active", "inactive")))

    @property
    def peak_bytes(self) -> int | None:
        """The most that the group has held, page cache included; None before Linux 5.19 with version 2."""
        return self.read("memory.peak" if self.version == 2 else "memory.max_usage_in_bytes")

    @property
    def oom_kills(self) -> int | None:
        """Processes of the group that the kernel killed because memory ran out; None: it does not count them."""
        return self.fields("memory.events" if self.version == 2 else "memory.oom_control").get("oom_kill")

    def set_limit(self, limit_bytes: int) -> None:
        """Limit memory, and forbid swap if the kernel counts it."""
        memory, swap, swap_bytes = "memory.max", "memory.swap.max", 0
        if self.version == 1:  # here the second file limits memory and swap together
            memory, swap, swap_bytes = "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", limit_bytes
        (self.folder / memory).write_text(str(limit_bytes))
        if (self.folder / swap).exists():
            (self.folder / swap).write_text(str(swap_bytes))

    def kill(self) -> None:
        """Kill every process of the group."""
        kill_all(self.folder)

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
    """The memory control groups of this process: its own first, then each one above; empty if there are none.

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
            continue  # mounted in addition to version 1, which has the memory controller
        # In a container the mount may show only a part of the tree; groups outside of it are not visible.
        seen = ".." not in Path(own).parts and Path(own).is_relative_to(root)
        folder = top / Path(own).relative_to(root) if seen else top
        found += [MemoryGroup(place, version) for place in (folder, *folder.parents) if place.is_relative_to(top)]
    return found


def _membership(line: str, version: int) -> str | None:
    """The path in a line of /proc/PID/cgroup (`4:memory:/a`, or `0::/a` for version 2), if it is for memory."""
    _, controllers, path = line.split(":", 2)
    wanted = controllers == "" if version == 2 else "memory" in controllers.split(",")
    return path if wanted else None


def _mount(line: str, version: int) -> tuple[str, Path] | None:
    """(group at the mount point, mount point) in a line of /proc/PID/mountinfo; None if it is another mount."""
    place, _, kind = line.partition(" - ")
    root, point = (re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), field) for field in place.split()[3:5])
    system, _, options = kind.split(" ", 2)
    wanted = system == "cgroup2" if version == 2 else system == "cgroup" and "memory" in options.split(",")
    return (root, Path(point)) if wanted else None


@contextlib.contextmanager
def limited_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """A new group with a limit, removed afterwards. Raises OSError if that is not possible."""
    parent = _parent()
    group = MemoryGroup(Path(tempfile.mkdtemp(prefix="hfedmoe-", dir=parent.folder)), parent.version)
    try:
        group.set_limit(limit_bytes)
        yield group
    finally:
        group.remove()


def _parent() -> MemoryGroup:
    """The group in which to make a new one, so that every limit of this process also holds for it. Raises OSError."""
    for group in memory_groups():
        if group.version == 1:
            return group
        # In version 2 a group with processes passes no controllers to groups below it: go up to one that does.
        if "memory" in (group.folder / "cgroup.subtree_control").read_text().split():
            return group
        if group.limit_bytes is not None:
            raise OSError(errno.EPERM, f"a new group outside {group.folder} would not have its limit")
    raise OSError(errno.ENOENT, "no cgroup with the memory controller can be used")
