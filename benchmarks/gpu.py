"""Measure our expert layer on one NVIDIA GPU, beside other implementations and the bare matrix products.

    python -m benchmarks.gpu --minutes 6 --json gpu.json
    python -m benchmarks.gpu --dry             # tiny shapes on the CPU: does everything run?

Sections, in this order: `speed` (`gpu_speed`), `profile` (`gpu_profile`) and `fits` (`gpu_fits`). Traces and tables of
kernels are written beside the JSON file. A section that fails does not stop the others, but the exit status is 1.
"""

import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.common import machine, parser

SHARES = {"speed": 0.58, "profile": 0.14, "fits": 0.28}
"""Of the time; what a section leaves goes to those after it."""
PACKAGES = ("triton", "transformers", "peft", "bitsandbytes", "experts4bit-qlora", "grouped-nf4-gemm")
Row = dict[str, Any]


@dataclass
class Section:
    """What a section found."""

    rows: list[Row]
    failures: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    """The result for people, to be printed at the end."""
    summary: dict[str, Any] = field(default_factory=dict)


def main() -> int:
    """Run the sections."""
    arguments = parser(__doc__)
    arguments.add_argument("--minutes", type=float, default=6.0, help="of all sections together")
    arguments.add_argument("--dry", action="store_true", help="tiny shapes on the CPU")
    arguments.add_argument("--only", default=",".join(SHARES), help="sections, separated by commas")
    given = arguments.parse_args()
    wanted = given.only.split(",")
    if not set(wanted) <= set(SHARES):
        arguments.error(f"--only takes some of {', '.join(SHARES)}")
    file = given.json
    traces = Path("gpu_traces") if file is None else file.with_suffix("")
    where = {**machine(), **versions(), "driver": driver(), "dry": given.dry}
    until, found = time.monotonic() + 60 * given.minutes, {}
    for place, name in enumerate(wanted):
        left = until - time.monotonic()
        minutes = left / 60 * SHARES[name] / sum(SHARES[other] for other in wanted[place:])
        begun = time.monotonic()
        print(f"--- {name}: {minutes:.1f} minutes", flush=True)
        found[name] = run(name, max(minutes, 0.0), given.dry, traces)
        print(f"--- {name} took {time.monotonic() - begun:.0f} s", flush=True)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"machine": where, **{key: vars(own) for key, own in found.items()}}, indent=1))
    show(where, found)
    return int(any(section.failures for section in found.values()))


def run(name: str, minutes: float, dry: bool, traces: Path) -> Section:
    """One section; an error in it becomes a failure."""
    sections: dict[str, Callable[[float, bool, Path], Section]] = {"speed": speed, "profile": profile, "fits": fits}
    try:
        return sections[name](minutes, dry, traces)
    except Exception:
        return Section([], [f"{name}: {traceback.format_exc()}"])


def speed(minutes: float, dry: bool, traces: Path) -> Section:
    """Times and memory of all implementations."""
    from benchmarks import gpu_speed

    rows = gpu_speed.measure(minutes, dry)
    summary = gpu_speed.summary(rows)
    return Section(rows, gpu_speed.failures(rows), gpu_speed.table(rows, summary), summary)


def profile(minutes: float, dry: bool, traces: Path) -> Section:
    """Kernels, waits and fragmentation of ours."""
    from benchmarks import gpu_profile

    rows = gpu_profile.measure(minutes, dry, traces)
    lines = [gpu_profile.line(row) for row in rows]
    return Section(rows, gpu_profile.failures(rows), [*gpu_profile.kernels(rows), *lines])


def fits(minutes: float, dry: bool, traces: Path) -> Section:
    """Whether the planner predicts the memory that clients need."""
    from benchmarks import gpu_fits

    rows = gpu_fits.measure(minutes, dry)
    failures = [f"fits: {row['error']}" for row in rows if row.get("error")]
    return Section(rows, failures, [", ".join(_short(row)) for row in rows])


def _short(row: Row) -> list[str]:
    """The plain values of a row."""
    return [
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
        if isinstance(value, (str, int, float)) and key != "error"
    ]


def show(where: Row, found: dict[str, Section]) -> None:
    """Print all results; what matters most comes last."""
    for name, section in reversed(found.items()):
        print(f"=== {name}")
        print("\n".join(section.lines))
    print("=== " + ", ".join(f"{key} {value}" for key, value in where.items() if value is not None))
    failures = [failure for section in found.values() for failure in section.failures]
    print(f"=== {len(failures)} failures")
    for failure in failures:
        print(failure[-600:])


def versions() -> dict[str, str | None]:
    """Versions of what is measured beside torch; None: not installed."""
    import torch

    found: dict[str, str | None] = {"cuda_of_torch": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def driver() -> str | None:
    """Name, driver, memory and clock limits of the GPU as `nvidia-smi` prints them; None without it."""
    asked = "name,driver_version,memory.total,power.limit,clocks.max.sm"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
