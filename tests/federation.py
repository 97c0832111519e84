"""A tiny federation, real in every part: model, data, clients, carrier and run folder."""

from hfedmoe.client.app import client_app
from hfedmoe.client.device import Device
from hfedmoe.config import RunConfig, load_config
from hfedmoe.data.partition import partition
from hfedmoe.events import Silent, Watcher
from hfedmoe.moe.payload import global_tensors
from hfedmoe.prepare import Prepared, prepare
from hfedmoe.runs import RunFolder
from hfedmoe.server.keeper import Keeper
from hfedmoe.server.server import Server
from hfedmoe.simulation import make_devices
from hfedmoe.wire.inprocess import InProcessGrid

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
