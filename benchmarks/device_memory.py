"""Memory of a device's processes, and of the server's SuperLink, after every round of a run with large messages.

    python -m benchmarks.device_memory [--rounds 12] [--rank 512] [--json FILE]

One server and one device on this machine, as `hfedmoe serve` and `hfedmoe join` start them; the tiny model with LoRA of
a high rank, so that little is computed and much is sent. Figures are proportional set sizes (a shared page counts once)
when a round has been written down. The processes must be the only ones of their names on the machine. Linux only.
"""

import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.carriers import process_memory
from benchmarks.common import parser, report
from benchmarks.device_round import LOOK_S, settings, write_model, write_rows
from hfedmoe.runs.folder import RunFolder

PROCESSES = {"supernode": "flower-supernode", "worker": "hfedmoe.fleet.worker", "superlink": "flower-superlink"}


def memory_MB() -> dict[str, float]:
    """Of each process that is there now."""
    found = {}
    for name, command in PROCESSES.items():
        pids = subprocess.run(["pgrep", "-f", command], capture_output=True, text=True, check=False).stdout.split()
        found[f"{name}_MB"] = max((process_memory(int(pid)) for pid in pids), default=0) / 1e6
    return found


def measured(folder: Path, rounds: int, rank: int) -> list[dict[str, Any]]:
    """A row for every round."""
    from tests.fleet.places import HOST, new_fleet
    from tests.fleet.processes import commands

    write_model("tiny", folder / "model")
    write_rows(folder / "rows.csv")
    config = settings(folder, rounds, "100%").replace("steps = 2", f"steps = 1\nrank = {rank}")
    (folder / "my.toml").write_text(config)
    new_fleet(folder, "north")
    rows: list[dict[str, Any]] = []
    with commands(folder) as started:
        started.start("north", "join", "north.invite", "--data", "rows.csv", "--budget", "100%", "--model", "model")
        server = started.start("server", "serve", "my.toml", "--out", "run", "--listen", HOST)
        while server.process.poll() is None:
            time.sleep(LOOK_S)
            done = (
                RunFolder.open(folder / "run").read_rounds()[1:] if (folder / "run" / "metrics.jsonl").exists() else []
            )
            if len(done) > len(rows):
                sent = {"down_MB": done[-1]["bytes_down"] / 1e6, "up_MB": done[-1]["bytes_up"] / 1e6}
                rows.append({"round": len(done), **sent, **memory_MB()})
                print(rows[-1], flush=True)
        if server.process.returncode:
            raise RuntimeError(server.said)
    return rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=12)
    arguments.add_argument("--rank", type=int, default=512)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = measured(Path(name), options.rounds, options.rank)
    report(rows, {}, options.json)


if __name__ == "__main__":
    main()
