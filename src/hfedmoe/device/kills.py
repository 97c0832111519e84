"""How many processes the system has killed because memory ran out, as Linux counts them.

A process that ends without a word may have been killed for its memory, by its owner, or by a power cut. Only the
first says something about its budget, and it is the only one that these counters show.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfedmoe.device.cgroups import memory_groups

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kills:
    """The counters at one moment."""

    boot: str
    """Another one after each start of the machine, when they begin at 0."""
    machine: int | None
    """Processes killed on the whole machine; None: an old kernel, which does not say."""
    group: str
    """Path and inode of this process's memory control group, empty if there is none: one that was made anew counts
    from 0."""
    in_group: int | None
    """Processes of that group that were killed; None: it does not say."""

    @classmethod
    def from_json(cls, tree: Any) -> "Kills":
        """From what `dataclasses.asdict` gives. Raises ValueError if it is something else."""
        if not isinstance(tree, dict) or set(tree) != set(cls.__dataclass_fields__):
            raise ValueError("not counters of kills")
        counts = (tree["machine"], tree["in_group"])
        if not all(count is None or (isinstance(count, int) and count >= 0) for count in counts):
            raise ValueError("not counters of kills")
        if not isinstance(tree["boot"], str) or not isinstance(tree["group"], str):
            raise ValueError("not counters of kills")
        return cls(**tree)


def kills_now(proc: Path = Path("/proc")) -> Kills | None:
    """The counters of now; None where the system has none (not Linux)."""
    try:
        boot = (proc / "sys" / "kernel" / "random" / "boot_id").read_text().strip()
    except OSError:
        return None
    machine = in_group = None
    group = ""
    try:
        lines = (proc / "vmstat").read_text().splitlines()
        machine = next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
        own = next(iter(memory_groups(proc / "self")), None)
        if own is not None:
            group = f"{own.folder} {own.folder.stat().st_ino}"
            in_group = own.oom_kills
    except OSError as error:  # a container may hide one of them
        logger.debug("not all counters of kills can be read: %s", error)
    return Kills(boot, machine, group, in_group)


def killed_for_memory(before: Kills | None, now: Kills | None) -> bool:
    """Whether a process was killed for its memory in between, as far as the system counted.

    The group's counter decides where it is the same group: a kill elsewhere on the machine says nothing then. A group
    that was made anew, as a service's or a container's is when it starts again, has no count of before: then the
    machine's decides.
    """
    if before is None or now is None or before.boot != now.boot:
        return False
    if before.group == now.group and before.in_group is not None and now.in_group is not None:
        return now.in_group > before.in_group
    return before.machine is not None and now.machine is not None and now.machine > before.machine
