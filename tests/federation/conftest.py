"""A tiny federation, real in every part: model, data, clients, carrier and run folder."""

from collections.abc import Callable
from pathlib import Path

import pytest

from hfedmoe.config import RunConfig, load_config
from hfedmoe.data.partition import partition
from hfedmoe.experiment import Prepared, make_devices, prepare
from hfedmoe.federation.client import client_app
from hfedmoe.federation.device import Device
from hfedmoe.federation.inprocess import InProcessGrid
from hfedmoe.federation.keeper import Keeper
from hfedmoe.federation.server import Server
from hfedmoe.moe.payload import global_tensors
from hfedmoe.report.live import Silent, Watcher
from hfedmoe.runs import RunFolder

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
        model = self.prepared.model
        parts = partition(self.prepared.task, config.partition, config.clients.count, config.seed)
        self.devices: list[Device] = make_devices(self.prepared, parts, global_tensors(model), watcher)
        self.grid = InProcessGrid(
            client_app(lambda context: self.devices[int(context.node_config["partition-id"])]), len(self.devices)
        )
        self.server = Server(
            config=config,
            tensors=global_tensors(model),
            num_experts=model.num_experts,
            top_k=[layer.top_k for layer in model.layers],
            evaluate=lambda tensors, kind: self.prepared.measure(tensors, kind, None),
            keeper=Keeper(folder, dict),
            watcher=watcher,
            watches=bool(self.prepared.watch),
        )

    def run(self) -> None:
        self.server.run(self.grid)


@pytest.fixture
def federation(tmp_path: Path) -> Callable[..., Federation]:
    """Makes a federation with overrides; its run folder is `tmp_path / "run"`."""

    def make(*overrides: str, watcher: Watcher | None = None) -> Federation:
        config = tiny_config(*overrides)
        return Federation(RunFolder.create(tmp_path / "run", config), config, watcher)

    return make
