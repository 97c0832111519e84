"""A tiny federation, real in every part: model, data, clients, carrier and run folder."""

from hfedmoe.config import RunConfig, load_config
from hfedmoe.data.partition import partition
from hfedmoe.events import Silent, Watcher
from hfedmoe.prepare import Prepared, prepare
from hfedmoe.runs.folder import RunFolder
from hfedmoe.simulation import assemble

TINY = [
    "model.name=tiny",
    "data.train_rows=160",
    "data.test_rows=30",
    "evaluation.watch_rows=6",
    "partition.min_rows=8",
    "partition.alpha=1.0",
    "clients.count=4",
    'clients.budgets=["25%","50%","100%","50%"]',
    "federation.rounds=2",
    "train.steps=2",
    "threads=1",
]


def tiny_config(*overrides: str) -> RunConfig:
    return load_config(None, [*TINY, *overrides])


class Federation:
    """A server and its clients, put together as `hfedmoe run` does, but open to meddling."""

    def __init__(self, folder: RunFolder | None, config: RunConfig, watcher: Watcher | None = None) -> None:
        watcher = watcher or Silent()
        self.prepared: Prepared = prepare(config, watcher)
        parts = partition(self.prepared.task, config.partition, config.clients.count, config.seed)
        self.simulation = simulation = assemble(self.prepared, parts, folder, watcher)
        self.devices, self.grid, self.server = simulation.devices, simulation.grid, simulation.server

    def run(self) -> None:
        self.server.run(self.grid)


class Stopped(Exception):
    """The run was ended from outside."""


class StopAt(Silent):
    """Ends the run when a round begins."""

    def __init__(self, round: int) -> None:
        self.round = round

    def round_started(self, round: int) -> None:
        if round == self.round:
            raise Stopped
