"""Clients per minute and memory of every carrier, with one to eight clients at once.

    python -m benchmarks.carriers [--quick] [--at-once 1 2 4 8] [--json FILE]

Eight clients take part in two rounds. Clients per minute are those of the second round without evaluation, so neither
the start nor the first pass over the rows counts. Every client works with one thread. `process` is the default carrier,
`ray` the workers of `carrier.kind = "ray"`, `flower` a SuperLink with as many SuperNodes and clients as work at once,
each of which starts a process for every message, as plain Flower does. The memory is that of all processes together at
its peak (proportional set size, which counts a shared page once), read from the operating system by this process, while
the run is another one.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import checkpoints
from benchmarks.common import parser, report
from hfedmoe import simulation
from hfedmoe.config import RunConfig, load_config
from hfedmoe.events import Silent
from hfedmoe.runs.folder import RunFolder
from hfedmoe.runs.settings import run_config_toml

CLIENTS, ROUNDS = 8, 2
LOOK_S = 0.5
APP = Path(__file__).parents[1] / "examples" / "flower"


def config_of(carrier: str, at_once: int, model: str, quick: bool) -> RunConfig:
    """The run that is measured. A fleet has as many clients as there are at once."""
    clients = at_once if carrier == "flower" else CLIENTS
    settings = [f"model.name={model}", "threads=1", f"clients.count={clients}", f"federation.rounds={ROUNDS}"]
    settings += [f"train.steps={2 if quick else 10}", "data.test_rows=16", "data.train_rows=400"]
    settings += ["evaluation.watch_rows=0", "partition.scheme=iid", "partition.min_rows=1"]
    if carrier == "ray":
        cpus = min(1.0, (os.cpu_count() or 1) / at_once)
        settings += ["carrier.kind=ray", f"carrier.clients_at_once={at_once}", f"carrier.cpus_per_client={cpus}"]
    return load_config(None, settings)


def one_run(carrier: str, at_once: int, model: str, quick: bool) -> dict[str, Any]:
    """Run a federation and say how fast its last round was."""
    config = config_of(carrier, at_once, model, quick)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        if carrier == "flower":
            _deployed(config, out, at_once)
        else:
            simulation.run(config, out, Silent())
        whole = time.perf_counter() - started
        lines = RunFolder.open(out).read_rounds()[1:]
    done = [row for row in lines[-1]["clients"] if row["status"] == "ok"]
    seconds = lines[-1]["seconds"] - lines[-1]["seconds_evaluation"]
    return {
        "clients_per_minute": 60 * len(done) / seconds,
        "training at a time": sum(row["seconds"] for row in done) / seconds,
        "start_s": whole - sum(line["seconds"] for line in lines),
    }


def _deployed(config: RunConfig, out: Path, nodes: int) -> None:
    from tests.deployment.harness import deployment

    with deployment(APP, [{"partition-id": number} for number in range(nodes)], env={"OMP_NUM_THREADS": "1"}) as flower:
        result = flower.run({"config": run_config_toml(config).decode(), "out": str(out)}, timeout=3600)
        if result.exit_code:
            raise RuntimeError(result.log)


def measured(carrier: str, at_once: int, model: str, quick: bool) -> dict[str, Any]:
    """A row of the table: a run in a process of its own, whose memory is watched from here."""
    command = [sys.executable, "-m", "benchmarks.carriers", "--one", carrier, str(at_once), model]
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command + (["--quick"] if quick else []), stdout=subprocess.PIPE, stderr=errors, text=True
        )
        peak = 0
        while child.poll() is None:
            peak = max(peak, process_memory(child.pid))
            time.sleep(LOOK_S)
        assert child.stdout is not None
        text = child.stdout.read()
        if child.returncode:
            errors.seek(0)
            raise RuntimeError(f"{carrier} with {at_once} at once: {errors.read()[-2000:]}")
    found = json.loads(text.strip().splitlines()[-1])
    return {"carrier": carrier, "at once": at_once, **found, "peak_MB": peak / 1e6}


def process_memory(pid: int) -> int:
    """Bytes of a process and of all that descend from it; those that end meanwhile are left out."""
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return total


def write_model(folder: Path) -> str:
    """A checkpoint with random weights."""
    checkpoints.write(checkpoints.half_gigabyte(), folder, torch.float32)
    return str(folder)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--quick", action="store_true", help="the tiny model and few steps")
    arguments.add_argument("--at-once", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    arguments.add_argument("--carriers", nargs="+", default=["process", "ray", "flower"], metavar="NAME")
    arguments.add_argument("--one", nargs=3, help="(internal) one run in this process: carrier, clients at once, model")
    options = arguments.parse_args()
    if options.one:
        carrier, at_once, model = options.one
        print(json.dumps(one_run(carrier, int(at_once), model, options.quick)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = "tiny" if options.quick else write_model(Path(folder) / "model")
        for carrier in options.carriers:
            for at_once in [1] if carrier == "process" else options.at_once:
                rows.append(measured(carrier, at_once, model, options.quick))
                print(rows[-1], file=sys.stderr, flush=True)
    report(rows, {"load when it ended": os.getloadavg()[0]}, options.json)


if __name__ == "__main__":
    main()
