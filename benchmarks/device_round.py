"""What a device's round costs beyond training: a process that stays, beside a process for every message.

    python -m benchmarks.device_round [--shape tiny half-gigabyte olmoe-1b-7b] [--rounds 4] [--json FILE]

One server and one device on this machine, as processes with TLS and keys. `join` is `hfedmoe serve` and `hfedmoe join`:
the device's worker keeps its model. `flower` is plain Flower, which starts a process for every message. A round is
measured from the server's request to the end of the round, without evaluation; what is beyond training is that less the
time in which the device trained. The first round is left out: in it the device says who it is and looks at its rows.
Bytes are those of a round in each direction. The memory is that of all processes of the device together at its peak
(proportional set size, which counts a shared page once).
"""

import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import checkpoints
from benchmarks.carriers import APP, process_memory
from benchmarks.common import parser, report
from hfedmoe.config import load_config
from hfedmoe.runs.folder import RunFolder
from hfedmoe.runs.settings import run_config_toml

LOOK_S = 0.5
ROWS = 32
SHAPES: dict[str, Callable[[], Any] | None] = {
    "tiny": None,
    "half-gigabyte": checkpoints.half_gigabyte,
    "olmoe-1b-7b": checkpoints.olmoe_1b_7b,
}


def write_model(shape: str, folder: Path) -> None:
    """A checkpoint with random weights."""
    config = SHAPES[shape]
    if config is None:
        from tests.fleet.places import save_tiny

        save_tiny(folder)
    else:
        checkpoints.write(config(), folder, torch.bfloat16 if shape == "olmoe-1b-7b" else torch.float32)


def write_rows(file: Path) -> None:
    """Rows of text with a label each."""
    lines = [f"{'profit ' * 8}{number},{('earn', 'acq')[number % 2]}" for number in range(ROWS)]
    file.write_text("text,label\n" + "\n".join(lines) + "\n")


def settings(folder: Path, rounds: int, budget: str) -> str:
    """The run's configuration."""
    return f"""
threads = {torch.get_num_threads()}
[model]
name = "{folder}/model"
[clients]
count = 1
budgets = ["{budget}"]
[federation]
rounds = {rounds}
min_clients = 1
[train]
steps = 2
batch_size = 4
[evaluation]
watch_rows = 0
own_share = 0
[method]
bootstrap = "stream"
[partition]
min_rows = 1
[data]
source = "{folder}/rows.csv"
test = "{folder}/rows.csv"
"""


@contextmanager
def watched(pid: Callable[[], int | None]) -> Iterator[list[int]]:
    """During the block, look at the memory of a process and its children; the list ends with the peak, in bytes."""
    peak, ended = [0], threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_S):
            process = pid()
            if process is not None:
                peak[0] = max(peak[0], process_memory(process))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def joined(folder: Path, rounds: int, budget: str) -> tuple[Path, int]:
    """`hfedmoe serve` and `hfedmoe join`; returns the run folder, and the peak of the device."""
    from tests.fleet.places import HOST, free_port, hfedmoe
    from tests.fleet.processes import commands

    (folder / "my.toml").write_text(settings(folder, rounds, budget))
    fleet = folder / "fleet"
    assert hfedmoe("serve", "init", HOST, "--port", str(free_port()), "--fleet", fleet) == 0
    assert hfedmoe("invite", "north", "--fleet", fleet, "--out", folder) == 0
    with commands(folder) as started:
        options = ["--data", "rows.csv", "--budget", budget, "--model", "model"]
        device = started.start("north", "join", "north.invite", *options)
        out = folder / "joined"
        server = started.start("server", "serve", "my.toml", "--fleet", fleet, "--out", out, "--listen", HOST)
        with watched(lambda: device.process.pid) as peak:
            while server.process.poll() is None:
                time.sleep(LOOK_S)
        if server.process.returncode:
            raise RuntimeError(f"{server.said}\n{device.said}")
    return out, peak[0]


def deployed(folder: Path, rounds: int, budget: str) -> tuple[Path, int]:
    """Plain Flower; returns the run folder, and the peak of the device."""
    from tests.deployment.harness import deployment

    config = folder / "plain.toml"
    config.write_text(settings(folder, rounds, budget))
    document, out = run_config_toml(load_config(config)).decode(), folder / "plain"
    node: dict[str, bool | int | float | str] = {"partition-id": 0, "data": str(folder / "rows.csv")}
    with deployment(APP, [node], env={}) as flower:
        with watched(lambda: flower.supernodes[0].popen.pid) as peak:
            result = flower.run({"config": document, "out": str(out)}, timeout=7200)
        if result.exit_code:
            raise RuntimeError("\n".join([result.log, *flower.logs().values()]))
    return out, peak[0]


def row_of(carrier: str, shape: str, out: Path, peak: int) -> dict[str, Any]:
    """A row of the table, from what the run wrote down."""
    lines = RunFolder.open(out).read_rounds()[2:]
    whole = [line["seconds"] - line["seconds_evaluation"] for line in lines]
    trained = [line["clients"][0]["seconds"] for line in lines]
    beyond = [one - other for one, other in zip(whole, trained, strict=True)]
    return {
        "shape": shape,
        "carrier": carrier,
        "round_s": statistics.median(whole),
        "training_s": statistics.median(trained),
        "beyond_s": statistics.median(beyond),
        "beyond_most_s": max(beyond),
        "beyond_share": statistics.median(beyond) / statistics.median(whole),
        "down_MB": statistics.median(line["bytes_down"] for line in lines) / 1e6,
        "up_MB": statistics.median(line["bytes_up"] for line in lines) / 1e6,
        "device_peak_MB": peak / 1e6,
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--shape", nargs="+", choices=SHAPES, default=["tiny"])
    arguments.add_argument("--rounds", type=int, default=4)
    arguments.add_argument("--budget", default="25%")
    options = arguments.parse_args()
    rows = []
    for shape in options.shape:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_model(shape, folder / "model")
            write_rows(folder / "rows.csv")
            for carrier, measured in (("join", joined), ("flower", deployed)):
                rows.append(row_of(carrier, shape, *measured(folder, options.rounds, options.budget)))
                print(json.dumps(rows[-1]), flush=True)
    report(rows, {"load when it ended": os.getloadavg()[0]}, options.json)


if __name__ == "__main__":
    main()
