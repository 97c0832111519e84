"""The peak memory of this process, from the operating system. Its imports take little memory."""

import sys
from pathlib import Path

from hfedmoe.device.rlimits import resource


def peak_process_bytes() -> int:
    """Peak resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: its value survives exec, so a child begins with the peak of its parent.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    if resource is None:
        import psutil

        return int(psutil.Process().memory_info().peak_wset)  # Windows
    peak = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak if sys.platform == "darwin" else peak * 1024
