"""Where the time of a round goes, how fast the server folds, and what many clients cost.

    python -m benchmarks.round [--quick] [--json FILE]

* A federation of an OLMoE-shaped random model (4 layers of 16 experts) with the real server and clients: the wall time
  of every round, by phase. Overhead is everything except training, evaluation and the clients' first forward pass.
* Folding: updates in the shape of OLMoE-1B-7B's LoRA (16 layers of 64 experts, rank 8). The fold bandwidth is the bytes
  of an update divided by the time to fold it. The memory bandwidth is the same bytes divided by the time of
  `Tensor.copy_` on tensors of the same sizes with as many threads, measured in turns: first with one thread, then with
  all. A fold reads the update once, and reads and writes the accumulator: it moves three bytes where a copy moves two.
* The peak memory of a server, in a separate process, that receives 10 and 10,000 updates in a round.
* 10,000 registered clients of which each round draws 100, through the entry point of `hfedmoe run`.
"""

import argparse
import csv
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from flwr.app import Context, Message

from benchmarks import checkpoints
from benchmarks.common import in_own_process, parser, report
from benchmarks.folding import fold_rows, fold_summary, global_tensors, update_with
from hfedmoe import prepare, simulation
from hfedmoe.client import app as client
from hfedmoe.client import device
from hfedmoe.config import load_config
from hfedmoe.device.peak import peak_process_bytes
from hfedmoe.events import Silent
from hfedmoe.runs.folder import RunFolder
from hfedmoe.server import server
from hfedmoe.server.evaluation import Metrics
from hfedmoe.server.fold import Fold
from hfedmoe.server.keeper import Keeper
from hfedmoe.wire import checks, requests
from hfedmoe.wire.inprocess import InProcessGrid
from hfedmoe.wire.messages import (
    DESCRIBE,
    PLAN,
    Description,
    describe_reply,
    facts_of,
    pack_bits,
    record,
    tensors_of,
    train_reply,
    unpack_bits,
)

# (where the name is looked up, name, phase); a phase's time does not include phases that it calls
TIMED = [
    (device, "train", "training"),
    (device, "bootstrap", "first pass"),
    (prepare, "evaluate", "evaluation"),
    (prepare, "load_all", "client set-up"),
    (device, "load", "client set-up"),
    (device, "restore", "client set-up"),
    (device, "extract", "packing"),
    (client, "train_reply", "packing"),
    (requests, "trainables_of", "checks"),
    (server, "train_request", "packing"),
    (server, "pack", "packing"),
    (device, "sub_model_bytes", "records"),
    (client, "_read_history", "client history"),
    (client, "_write_history", "client history"),
    (checks, "update", "checks"),
    (Fold, "add", "fold"),
    (Fold, "result", "fold"),
    (RunFolder, "append_round", "records"),
    (RunFolder, "save_checkpoint", "checkpoint"),
]
WORK = ("training", "evaluation", "first pass")


class Stopwatch:
    """Seconds by phase of the wrapped functions, without the phases that they call."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []

    def wrap(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.perf_counter() - started
                self.seconds[phase] = self.seconds.get(phase, 0.0) + taken - self._inner.pop()
                if self._inner:
                    self._inner[-1] += taken

        return timed

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for place, name, phase in TIMED:
                stack.enter_context(patch.object(place, name, self.wrap(getattr(place, name), phase)))
            yield


class Rounds(Silent):
    """The phases of every round, from its start to its checkpoint."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch
        self.rows: list[dict[str, Any]] = []

    def round_started(self, round: int) -> None:
        self.watch.seconds.clear()
        self._started = time.perf_counter()

    def round_done(self, round: int, seconds: float, bytes_down: int, bytes_up: int) -> None:
        total, phases = time.perf_counter() - self._started, dict(self.watch.seconds)
        phases["rest"] = total - sum(phases.values())
        overhead = total - sum(phases.get(name, 0.0) for name in WORK)
        shares = {
            "overhead_share": overhead / total,
            "overhead_share_with_first_pass": (overhead + phases.get("first pass", 0.0)) / total,
        }
        self.rows.append({"round": round, "seconds": total} | shares | phases)


def rounds_of(quick: bool) -> list[dict[str, Any]]:
    """Phases of a real federation's rounds."""
    settings = ["clients.count=4", "federation.rounds=3", "train.steps=4", "evaluation.watch_rows=32"]
    settings += ["data.test_rows=32", "data.train_rows=400"]
    if quick:
        settings += ["clients.count=2", "federation.rounds=2", "train.steps=2"]
    watch = Stopwatch()
    rounds = Rounds(watch)
    with tempfile.TemporaryDirectory() as folder, watch.watching():
        checkpoints.write(checkpoints.half_gigabyte(), Path(folder) / "model", torch.float32)
        config = load_config(None, [f"model.name={folder}/model", *settings])
        simulation.run(config, Path(folder) / "run", rounds)
    return rounds.rows


def server_of(clients: int) -> dict[str, Any]:
    """A server that receives one update of each of the clients in a round; clients exist only while they answer."""
    num_experts = [16] * 2  # an update is 0.4 MB: 10,000 of them would show
    tensors = global_tensors(2, 16, 256, 256, 8, "factors")
    draws = torch.Generator().manual_seed(0)

    def answer(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        if message.metadata.message_type == DESCRIBE:
            return Message(
                describe_reply(Description(number, f"client {number}", 100, 16, num_experts)), reply_to=message
            )
        if message.metadata.message_type == PLAN:
            bits = [torch.rand(16, generator=draws).argsort() < 4 for _ in num_experts]
            return Message(record({"resident": pack_bits(bits)}), reply_to=message)
        resident = unpack_bits(facts_of(message)["resident"], num_experts)
        tensors_of(message)
        return Message(train_reply(update_with(tensors, resident, draws)), reply_to=message)

    config = load_config(None, [f"clients.count={clients}", "federation.rounds=1", "train.steps=1"])
    measured = Metrics(accuracy=0.5, macro_f1=0.5, loss=1.0, examples=1, perplexity=2.718)
    with tempfile.TemporaryDirectory() as folder, RunFolder.create(Path(folder) / "run", config) as run:
        started = time.perf_counter()
        server.Server(
            config=config,
            tensors=tensors,
            num_experts=num_experts,
            top_k=[2] * 2,
            evaluate=lambda tensors, kind: measured,
            keeper=Keeper(run, dict),
            watcher=Silent(),
            watches=False,
        ).run(InProcessGrid(answer, clients))  # type: ignore[arg-type]
        seconds, peak = time.perf_counter() - started, peak_process_bytes()  # before the whole line is read below
        (line,) = [line for line in run.iter_rounds() if line["round"] == 1]
        assert sum(row["status"] == "ok" for row in line["clients"]) == clients
    return {"clients": clients, "seconds": seconds, "peak_bytes": peak}


WORDS = ("profit", "share", "bank", "oil", "dollar", "trade", "ship", "grain", "wheat", "loss", "net", "quarter")


def registered(clients: int, per_round: int) -> dict[str, Any]:
    """A run of the tiny model with `clients` registered clients; each round draws `per_round` of them."""
    with tempfile.TemporaryDirectory() as folder:
        draws = random.Random(0)
        with (Path(folder) / "rows.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for row in range(4 * clients + 200):
                writer.writerow([" ".join(draws.choices(WORDS, k=12)), ("earn", "acq", "crude", "trade")[row % 4]])
        settings = ["model.name=tiny", f"data.source={folder}/rows.csv", "data.test_share=0.005", "data.test_rows=64"]
        settings += ["partition.scheme=iid", "partition.min_rows=1", f"clients.count={clients}"]
        settings += [f"federation.clients_per_round={per_round}", "federation.rounds=3", "train.steps=1"]
        started = time.perf_counter()
        run = simulation.run(load_config(None, settings), Path(folder) / "run", Silent())
        seconds = time.perf_counter() - started
        lines = RunFolder.open(run).read_rounds()[1:]
        return {
            "clients": clients,
            "per_round": per_round,
            "seconds": seconds,
            "round_s": statistics.median(line["seconds"] for line in lines),
            "training_s": statistics.median(line["seconds_training"] for line in lines),
            "peak_bytes": peak_process_bytes(),
            "folder_bytes": sum(path.stat().st_size for path in run.rglob("*") if path.is_file()),
        }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    arguments.add_argument("--server-of", type=int, help=argparse.SUPPRESS)
    arguments.add_argument("--registered", type=int, nargs=2, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.server_of:
        print(json.dumps(server_of(options.server_of)))
        return
    if options.registered:
        print(json.dumps(registered(*options.registered)))
        return
    rounds = rounds_of(options.quick)
    folds = fold_rows(options.quick)
    many = 200 if options.quick else 10_000
    few_server, many_server = (in_own_process("benchmarks.round", ["--server-of", str(n)]) for n in (10, many))
    crowd = in_own_process("benchmarks.round", ["--registered", str(many), "5" if options.quick else "100"])
    summary = {
        "overhead_share": statistics.median(row["overhead_share"] for row in rounds),
        # The clients' first pass is only in the first round, so this is the share over all rounds.
        "overhead_share_with_first_pass": sum(row["seconds"] * row["overhead_share_with_first_pass"] for row in rounds)
        / sum(row["seconds"] for row in rounds),
        **fold_summary(folds),
        "server_bytes_10_clients": few_server["peak_bytes"],
        f"server_bytes_{many}_clients": many_server["peak_bytes"],
        "server_seconds_per_update": many_server["seconds"] / many,
        **{f"registered_{key}": value for key, value in crowd.items()},
    }
    names = list(dict.fromkeys(name for row in rounds for name in row))
    for row in folds:
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    report([{name: row.get(name, 0.0) for name in names} for row in rounds], summary, options.json, {"folds": folds})


if __name__ == "__main__":
    main()
