"""Run a federation of simulated clients: what `hfedmoe run` does."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import Context, RecordDict
from torch import Tensor

from hfedmoe.client.device import Device
from hfedmoe.config import RunConfig
from hfedmoe.device.probe import usable_cores
from hfedmoe.errors import UserError
from hfedmoe.events import Watcher
from hfedmoe.files.disk import require_room
from hfedmoe.method.methods import METHODS
from hfedmoe.moe.payload import load_all
from hfedmoe.prepare import Prepared, prepare, server_for
from hfedmoe.runs.choice import fitting
from hfedmoe.runs.folder import RunFolder
from hfedmoe.runs.identity import DEPLOYED, check_identity, read_identity, write_identity
from hfedmoe.runs.log import logging_to
from hfedmoe.runs.paths import with_absolute_paths
from hfedmoe.server.keeper import Keeper
from hfedmoe.server.server import Server, server_app
from hfedmoe.simulated import WorkerApp, app_of, as_trained, devices_of, identity, split
from hfedmoe.wire.cluster import Cluster, connected
from hfedmoe.wire.inprocess import InProcessGrid
from hfedmoe.wire.local import LocalGrid, changed_contexts, restore_contexts
from hfedmoe.wire.rayed import RayGrid


def run(
    config: RunConfig, out: Path | None, watcher: Watcher, begun: Callable[[Path], None] = lambda folder: None
) -> Path:
    """Run a federation from its first round; returns the run folder. `begun` is told the folder when it is there.

    Raises:
        UserError: the configuration, model, data or folder cannot be used, or too few clients gave a valid update.
    """
    config = with_absolute_paths(config)
    with RunFolder.create(out, config) as folder, ExitStack() as stack:
        begun(folder.path)
        try:
            cluster = stack.enter_context(_cluster(config, watcher))
            prepared = prepare(config, watcher)
            parts = _split(prepared, watcher)
        except UserError:
            folder.discard()  # nothing has run: the same folder can be used again
            raise
        if prepared.settled is not config:
            folder.settle(prepared.settled)
        write_identity(folder.path, identity(prepared))
        folder.describe(prepared.about(parts))
        _run(folder, prepared, parts, None, watcher, cluster)
        return folder.path


def resume(path: Path, watcher: Watcher) -> Path:
    """Continue a run from its last checkpoint; without any checkpoint, start it again.

    Raises:
        UserError: not a run folder, in use by another process, or as `run`.
    """
    with RunFolder.open(path, to_write=True) as folder, ExitStack() as stack:
        was = read_identity(path)
        if was is not None and was.carrier == DEPLOYED:
            raise UserError(
                f"{path}: this run used real devices, which keep their own memory, so it cannot continue here; "
                f"`hfedmoe serve --resume {path}` continues a run of `hfedmoe serve`; one of `flwr run` continues by "
                "itself while its SuperLink runs, else start again with `flwr run` and its config.toml"
            )
        cluster = stack.enter_context(_cluster(folder.config, watcher))
        prepared = prepare(folder.config, watcher)
        check_identity(path, identity(prepared))
        if was is None:
            write_identity(path, identity(prepared))
        round = None
        if folder.saved_rounds():
            round = folder.load_checkpoint("last").round
        folder.rewind(-1 if round is None else round)
        _run(folder, prepared, _split(prepared, watcher), round, watcher, cluster)
        return folder.path


@contextmanager
def _cluster(config: RunConfig, watcher: Watcher) -> Iterator[Cluster | None]:
    """Ray during the block, if the clients work there. Raises UserError if it cannot be used."""
    if config.carrier.kind == "process":
        yield None
        return
    address = config.carrier.address
    watcher.phase("starting Ray" if address is None else f"connecting to Ray at {address}")
    clients = config.federation.clients_per_round or config.clients.count
    if METHODS[config.method.name].pooled:
        clients = 1
    with connected(config.carrier, clients, usable_cores()) as cluster:
        yield cluster


def _split(prepared: Prepared, watcher: Watcher) -> list[list[int]]:
    watcher.phase("splitting the data over the clients")
    return split(prepared)


def _run(
    folder: RunFolder,
    prepared: Prepared,
    parts: list[list[int]],
    from_round: int | None,
    watcher: Watcher,
    cluster: Cluster | None,
) -> None:
    for text in prepared.warnings:
        watcher.warning(text)
    # The checkpoints that are kept, the best one, and the one that is being written.
    size = sum(tensor.nbytes for tensor in prepared.initial.values())
    require_room(folder.path, size * (prepared.config.keep_checkpoints + 2))
    with logging_to(folder.path):
        simulation = assemble(prepared, parts, folder, watcher, from_round, cluster)
        simulation.run()
    keeper = simulation.server.keeper
    watcher.finish(f"done: {folder.path}")
    before, after = (keeper.scores[0], keeper.scores[-1]) if keeper.scores else (None, None)
    watcher.final_table(keeper.final_totals(), before, after)


@dataclass
class Simulation:
    """A server and its clients."""

    server: Server
    devices: list[Device]
    """Empty if they are in workers of Ray."""
    grid: LocalGrid

    def run(self) -> None:
        """Run all remaining rounds. Raises UserError like `Server.run`."""
        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={}, series_id=0)
        server_app(lambda _: self.server)(self.grid, context)


def assemble(
    prepared: Prepared,
    parts: list[list[int]],
    folder: RunFolder | None,
    watcher: Watcher,
    from_round: int | None = None,
    cluster: Cluster | None = None,
) -> Simulation:
    """Put a federation together.

    Args:
        parts: the rows of every client, as indices into `prepared.task.train`.
        folder: where the run is kept; None: nowhere.
        from_round: round of the checkpoint from which the run continues; None: it begins.
        cluster: where the clients work; None: in this process.

    Raises:
        UserError: the checkpoint is damaged or does not fit the model.
    """
    whole = prepared
    prepared, parts = as_trained(prepared, parts)
    steps = prepared.config.train.steps
    devices: list[Device] = []
    if cluster is None:
        devices = devices_of(prepared, parts, lambda client, step, loss: watcher.step(client, step, steps, loss))
        grid: LocalGrid = InProcessGrid(app_of(devices), len(devices))
    else:
        if prepared.model.device.type != "cpu" and not prepared.config.carrier.gpus_per_client:
            watcher.warning(
                f"this machine has {prepared.model.device}, but its clients work on CPUs; carrier.gpus_per_client "
                "gives them GPUs"
            )
        watcher.phase(f"{cluster.at_once} workers load {prepared.config.model.name}")
        grid = RayGrid(WorkerApp.of(whole), len(parts), cluster, watcher, steps)
    keeper = Keeper(folder, lambda: _to_tensors(changed_contexts(grid)), from_round)
    tensors = None
    if folder is not None and from_round is not None:
        checkpoint = folder.load_checkpoint(from_round)
        tensors = checkpoint.tensors
        with fitting(checkpoint):
            load_all(prepared.model, tensors)
        restore_contexts(grid, _to_bytes(checkpoint.clients or {}))
    return Simulation(server_for(prepared, keeper, watcher, tensors, from_round or 0), devices, grid)


def _to_tensors(saved: dict[str, bytes]) -> dict[str, Tensor]:
    return {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in saved.items() if data}


def _to_bytes(saved: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in saved.items()}
