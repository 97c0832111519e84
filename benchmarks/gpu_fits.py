"""Does the planner predict GPU memory? Its peak against torch's allocator and against the driver's figure.

    python -m benchmarks.gpu_fits [--minutes 2] [--json FILE]     # on a machine with one NVIDIA GPU
    python -m benchmarks.gpu_fits --dry [--only NAME]             # tiny, on the CPU: only shows that it runs

Every client (`benchmarks.gpu_cases`) is a process of its own, and only one has memory of the GPU at a time. The
planner runs before, in other processes, with fake tensors on the GPU; and once more without seeing it, as on a laptop.

Columns: `fit_allocated` is the predicted peak without the framework divided by torch's peak, `fit_driver` the whole
prediction divided by what the driver says; `away` is the same as `fit_allocated` for the plan without a GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from benchmarks.common import parser, report
from benchmarks.gpu_cases import Case, cases

LONGEST_S = 100.0
"""Of one client's work on the GPU."""
WORTH_S = 6.0
"""No client begins with less time than this."""


def plan(case: Case, folder: Path, device: str) -> dict[str, Any]:
    """What the planner says about a client; with a memory to hold it to, also how many experts fit into that."""
    from hfedmoe.device.planner import Planner

    started, settings = time.perf_counter(), list[str]()
    planner = Planner(case.config(folder, device, settings))
    limit = None if case.hold_gib is None else round(case.hold_gib * 2**30)
    if limit is None:
        forecast = planner.forecast(max(planner.smallest, round(case.share * sum(planner.num_experts))))
    else:
        fit = planner.fit(limit)
        if not fit.fits:
            change = planner.smallest_change(limit)
            if change is None:
                raise RuntimeError(f"{case.name}: {limit} bytes cannot hold the fewest experts with any change")
            settings = str(change).split(", ")
            planner = Planner(case.config(folder, device, settings))
            fit = planner.fit(limit)
        forecast = fit.forecast
    return {
        "residents": forecast.residents,
        "experts": forecast.num_residents,
        "of": sum(planner.num_experts),
        "settings": settings,
        "limit_bytes": limit,
        "peak": forecast.peak,
        "kinds": forecast.kinds,
        "loading_peak": forecast.loading_peak,
        "held": sum(forecast.kinds[kind] for kind in _HELD),
        "plan_s": time.perf_counter() - started,
    }


_HELD = ("embeddings_head", "attention", "other_base", "routers", "experts", "adapters")


def plan_all(names: Sequence[str], work: Path, dry: bool) -> None:
    """Print the plan of each case as a line of JSON, or its traceback."""
    for name in names:
        case = cases(dry)[name]
        try:
            made = plan(case, _folder(work, case), _device(dry))
        except Exception:
            made = {"error": traceback.format_exc()}  # the other cases are planned all the same
        print(json.dumps({"name": name} | made), flush=True)


def measure(minutes: float, dry: bool, only: Sequence[str] = ()) -> list[dict[str, object]]:
    """One row per client; a client that failed has its traceback under "error".

    Args:
        minutes: no client begins later than this.
        only: names of cases; all if empty.
    """
    end = time.monotonic() + 60 * minutes
    chosen = [case for name, case in cases(dry).items() if not only or name in only]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, _processes() as start:
        work = Path(name)
        _write(chosen, work)
        names = [case.name for case in chosen]
        cores = os.cpu_count() or 1
        groups = [part for part in (names[i :: max(1, cores // 4)] for i in range(max(1, cores // 4))) if part]
        planners = [start(_command("--plan", work, dry, group), {}) for group in groups]
        waiting = {case.name: start(_client(case, work, dry), {}) for case in chosen[: max(0, cores // 2 - 1)]}
        hidden = {"CUDA_VISIBLE_DEVICES": ""}
        away = [] if dry else [start(_command("--plan", work, dry, group), hidden) for group in groups]
        plans = {row["name"]: row for planner in planners for row in _lines(planner, end)}
        elsewhere: dict[str, dict[str, Any]] = {}
        if not all("peak" in plans.get(name, {}) for name in names):
            elsewhere = {row["name"]: row for planner in away for row in _lines(planner, end)}
        rows = []
        for index, case in enumerate(chosen):
            for other in chosen[index : index + max(1, cores // 2)]:
                if other.name not in waiting:
                    waiting[other.name] = start(_client(other, work, dry), {})
            planned, problem = plans.get(case.name), None
            if planned is None or "error" in planned:
                # The client is measured all the same, with the other plan.
                problem = "it was not planned" if planned is None else planned["error"]
                planned = plans[case.name] = elsewhere.get(case.name, {"error": problem})
            rows.append(_measured(case, planned, waiting.pop(case.name), end))
            if problem is not None:
                rows[-1]["error"] = f"planning with the GPU failed: {problem}\n{rows[-1].get('error', '')}"
            if rows[-1].get("status") == "out_of_memory" and end - time.monotonic() > 2 * WORTH_S:
                free = plans[case.name] | {"limit_bytes": None}
                again = _measured(case, free, start(_client(case, work, dry), {}), end)
                rows[-1]["without_limit"] = again
            print(_short(rows[-1]), file=sys.stderr, flush=True)
        elsewhere = elsewhere or {row["name"]: row for planner in away for row in _lines(planner, end)}
    for row in rows:
        row["plan_away"] = elsewhere.get(str(row["name"]))
    return rows


def _measured(case: Case, planned: dict[str, Any], client: "_Process", end: float) -> dict[str, object]:
    """Let a waiting client work, and compare."""
    row: dict[str, object] = {"name": case.name, "shape": case.shape, "batch": f"{case.batch} x {case.length}"}
    if "error" in planned:
        client.stop()
        return row | {"error": planned["error"]}
    left = end - time.monotonic()
    if left < WORTH_S:
        client.stop()
        return row | {"plan": planned, "error": "no time was left for it"}
    from benchmarks.gpu_client import driver_bytes

    before, began = driver_bytes(), time.monotonic()
    order = {name: planned[name] for name in ("residents", "settings", "limit_bytes")}
    try:
        found = client.finish(json.dumps(order) + "\n", min(left, LONGEST_S))[-1]
    except (RuntimeError, ValueError, IndexError) as error:
        return row | {"plan": planned, "error": f"{type(error).__name__}: {error}"}
    row |= {"plan": planned, **found, "driver_before": before, "wall_s": time.monotonic() - began}
    if "allocated" in found:
        used = found["driver_used"]
        driver = found["device_used"] if used is None or before is None else used - before
        row |= {"driver": driver, "fit_driver": planned["peak"] / driver if driver > 0 else float("nan")}
        row["fit_allocated"] = (planned["peak"] - planned["kinds"]["framework"]) / found["allocated"]
    return row


class _Process:
    """A worker whose last lines of output are JSON."""

    def __init__(self, command: list[str], more: dict[str, str], errors: IO[str]) -> None:
        environment = {"OMP_NUM_THREADS": "2", **os.environ, **more}
        self._errors = errors
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )

    def finish(self, line: str, seconds: float) -> list[dict[str, Any]]:
        """Send a line and wait for the end. Raises RuntimeError if it fails or takes longer."""
        try:
            out, _ = self._process.communicate(line, timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            self.stop()
            raise RuntimeError(f"it took more than {seconds:.0f} s\n{self._last_words()}") from None
        if self._process.returncode != 0:
            raise RuntimeError(f"it ended with {self._process.returncode}\n{self._last_words()}")
        return [json.loads(text) for text in out.splitlines() if text.startswith("{")]

    def _last_words(self) -> str:
        return Path(self._errors.name).read_text(encoding="utf-8", errors="replace")[-3000:]

    def stop(self) -> None:
        """End it now, if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


@contextmanager
def _processes() -> Iterator[Any]:
    """Starts workers; those that still run at the end are stopped."""
    started: list[_Process] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:

        def start(command: list[str], more: dict[str, str]) -> _Process:
            errors = (Path(name) / f"{len(started)}.txt").open("w", encoding="utf-8")
            started.append(_Process(command, more, errors))
            errors_of.append(errors)
            return started[-1]

        errors_of: list[IO[str]] = []
        try:
            yield start
        finally:
            for process in started:
                process.stop()
            for errors in errors_of:
                errors.close()


def _lines(process: _Process, end: float) -> list[dict[str, Any]]:
    """The plans of a planner; one that fails as a whole says so and gives none."""
    try:
        return process.finish("", max(10.0, end - time.monotonic()))
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr, flush=True)
        return []


def _command(what: str, work: Path, dry: bool, names: Sequence[str]) -> list[str]:
    flags = ["--dry"] if dry else []
    return [sys.executable, "-m", "benchmarks.gpu_fits", *flags, what, str(work), *names]


def _client(case: Case, work: Path, dry: bool) -> list[str]:
    return _command("--client", work, dry, [case.name])


def _device(dry: bool) -> str:
    return "cpu" if dry else "cuda"


def _folder(work: Path, case: Case) -> Path:
    return work / case.name.replace(" ", "_")


def _write(chosen: Sequence[Case], work: Path) -> None:
    from benchmarks.random_weights import write_config, write_rows

    for case in chosen:
        model = dict(case.model)
        write_config(model.pop("model_type"), model, _folder(work, case))
        write_rows(_folder(work, case) / "rows.jsonl", case.length)


def _short(row: dict[str, object]) -> dict[str, object]:
    """The row as a line of the table; bytes in MB."""
    planned: Any = row.get("plan") or {}
    away: Any = row.get("plan_away") or {}
    megabytes = {
        "planned": planned.get("peak"),
        "framework": planned.get("kinds", {}).get("framework"),
        "allocated": row.get("allocated"),
        "reserved": row.get("reserved"),
        "driver": row.get("driver"),
        "context": row.get("context"),
        "plan_held": planned.get("held"),
        "held": row.get("held"),
    }
    allocated: Any = row.get("allocated")
    line: dict[str, object] = {"name": row["name"], "experts": f"{planned.get('experts')}/{planned.get('of')}"}
    line |= {f"{name}_MB": None if size is None else round(size / 1e6) for name, size in megabytes.items()}
    line |= {name: row.get(name) for name in ("fit_allocated", "fit_driver")}
    if allocated and "peak" in away:
        line["away"] = (away["peak"] - away["kinds"]["framework"]) / allocated
        if away["experts"] != planned["experts"]:  # another number of experts fits: no comparison
            line["away"] = f"{away['experts']} experts"
    else:
        line["away"] = None
    line |= {name: row.get(name) for name in ("retries", "build_s", "train_s", "wall_s")}
    line["failed"] = "yes" if "error" in row else ""
    return line


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many clients fit the bound of 10 %, and the worst ratios."""
    measured = [row for row in rows if "fit_driver" in row and "error" not in row]
    summary: dict[str, Any] = {"clients": len(rows), "measured": len(measured)}
    for name in ("fit_allocated", "fit_driver"):
        ratios = [row[name] for row in measured]
        if ratios:
            summary[f"worst_{name}"] = max(ratios, key=lambda ratio: abs(ratio - 1))
            summary[f"within_10_%_{name}"] = sum(abs(ratio - 1) <= 0.1 for ratio in ratios)
    return summary


def main() -> int:
    """Measure and print; 1 if a client failed."""
    arguments = parser(__doc__)
    arguments.add_argument("--minutes", type=float, default=2.0, help="no client begins later than this")
    arguments.add_argument("--dry", action="store_true", help="tiny clients on the CPU")
    arguments.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these clients")
    arguments.add_argument("--plan", nargs="+", help=argparse.SUPPRESS)
    arguments.add_argument("--client", nargs=2, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.plan:
        plan_all(given.plan[1:], Path(given.plan[0]), given.dry)
        return 0
    if given.client:
        from benchmarks.gpu_client import serve

        case = cases(given.dry)[given.client[1]]
        serve(case, _folder(Path(given.client[0]), case), _device(given.dry))
        return 0
    rows = measure(given.minutes, given.dry, given.only)
    report([_short(row) for row in rows], summarise(rows), given.json, {"clients": rows})
    failed = [row for row in rows if "error" in row]
    for row in failed:
        print(f"\n{row['name']}: {row['error']}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
