"""Time to a target accuracy where devices are unequally fast: rounds, rounds without the slowest, and no rounds.

    python -m benchmarks.asynchronous [CONFIG] [--seeds 0 1 2] [--quick] [--json FILE]

Training takes simulated time: a client takes `SPEEDS` seconds, in turn. All arms have the same splits, budgets and
seeds, and run until as much simulated time is over as the rounds of the configuration take. The target is the accuracy
that `rounds` ends with. `late` goes on with the first six of eight and folds the others in when they come; `spare`
drops them; `async` changes the model after every four updates.
"""

import contextlib
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import parser, report
from benchmarks.simulated_time import SimulatedTime
from hfedmoe.config import RunConfig, load_config
from hfedmoe.data.partition import partition
from hfedmoe.events import ClientRound, Evaluation, Silent
from hfedmoe.prepare import prepare
from hfedmoe.simulation import assemble

SPEEDS = (1, 1, 1, 1, 2, 2, 4, 8)
"""Seconds of one training."""
ARMS = {
    "rounds": [],
    "spare": ["federation.clients_per_round=6", "federation.spare_clients=2"],
    "late": ["federation.clients_per_round=6", "federation.spare_clients=2", "federation.late=fold"],
    "async": ["federation.mode=async", "federation.buffer=4"],
}
QUICK = ["model.name=tiny", "data.source=reuters-r8", "data.train_rows=320", "data.test_rows=60", "train.steps=2"]
MOST = 10_000
"""Rounds; the time ends a run."""


class Ends(Exception):
    """The simulated time is over."""


class Clock(Silent):
    """Notes the accuracy over simulated time."""

    def __init__(self, until: float) -> None:
        self.until = until
        self.grid: SimulatedTime | None = None
        self.found: list[tuple[float, float]] = []
        self.trained = 0

    def evaluated(self, found: Evaluation) -> None:
        """As `events.Watcher`."""
        if found.kind == "all" and found.accuracy is not None:
            now = 0.0 if self.grid is None else self.grid.now
            self.found.append((now, found.accuracy))

    def client_done(self, round: int, client: int, done: ClientRound) -> None:
        """As `events.Watcher`."""
        self.trained += done.status == "ok"

    def round_done(self, round: int, seconds: float, bytes_down: int, bytes_up: int) -> None:
        """As `events.Watcher`."""
        if self.grid is not None and self.grid.now >= self.until:
            raise Ends


def one(config: RunConfig, until: float) -> Clock:
    """Run one arm until the time is over."""
    clock = Clock(until)
    ready = prepare(config, clock)
    parts = partition(ready.task, config.partition, config.clients.count, config.seed)
    simulation = assemble(ready, parts, None, clock)
    clock.grid = SimulatedTime(simulation.grid, lambda client: float(SPEEDS[client % len(SPEEDS)]))
    with contextlib.suppress(Ends):
        simulation.server.run(clock.grid)
    return clock


def reached(found: Sequence[tuple[float, float]], target: float) -> float | None:
    """The first time at which the accuracy was reached, between two evaluations by a straight line; None: never."""
    before = found[0]
    for now in found:
        if now[1] >= target:
            share = 1.0 if now[1] == before[1] else (target - before[1]) / (now[1] - before[1])
            return before[0] + share * (now[0] - before[0])
        before = now
    return None


def main() -> None:
    """Run every arm with every seed and print the table."""
    arguments = parser(__doc__)
    arguments.add_argument("config", nargs="?", type=Path, default=Path("configs/compare/newsgroups.toml"))
    arguments.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments.add_argument("--quick", action="store_true", help="the tiny model, which takes a minute")
    given = arguments.parse_args()
    sets = [
        "evaluation.every=1",
        "evaluation.own_share=0",
        "clients.count=8",
        "train.lr_final_share=1",
        *(QUICK if given.quick else []),
    ]
    rows: list[dict[str, Any]] = []
    for seed in given.seeds:
        plain = load_config(given.config, [*sets, f"seed={seed}"])
        until, target = plain.federation.rounds * float(max(SPEEDS)), 0.0
        for name, more in ARMS.items():
            settings = [*sets, f"seed={seed}", *more]
            if name != "rounds":
                settings.append(f"federation.rounds={MOST}")
            clock = one(load_config(given.config, settings), until)
            target = clock.found[-1][1] if name == "rounds" else target
            rows.append(
                {
                    "arm": name,
                    "seed": seed,
                    "before": clock.found[0][1],
                    "after": clock.found[-1][1],
                    "trainings": clock.trained,
                    "seconds to target": reached(clock.found, target),
                    "of rounds": until,
                }
            )
            print(rows[-1], flush=True)
    summary: dict[str, Any] = {}
    for name in ARMS:
        own = [row for row in rows if row["arm"] == name]
        times = [row["seconds to target"] for row in own]
        known = [time for time in times if time is not None]
        summary[f"{name}: mean accuracy at the end"] = statistics.fmean(row["after"] for row in own)
        summary[f"{name}: mean simulated seconds to target"] = statistics.fmean(known) if known else None
        summary[f"{name}: seeds that reached it"] = f"{len(known)} of {len(own)}"
    report(rows, summary, given.json)


if __name__ == "__main__":
    main()
