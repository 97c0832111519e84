"""Run a federation of simulated clients in this process: what `hfedmoe run` does."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from flwr.app import Context, RecordDict
from torch import Tensor

from hfedmoe.client.app import client_app
from hfedmoe.client.device import Device
from hfedmoe.config import RunConfig
from hfedmoe.data.partition import partition
from hfedmoe.errors import UserError
from hfedmoe.events import Watcher
from hfedmoe.files.disk import require_room
from hfedmoe.method.methods import METHODS
from hfedmoe.moe.payload import load_all
from hfedmoe.prepare import Prepared, prepare, server_for
from hfedmoe.runs.choice import fitting
from hfedmoe.runs.folder import RunFolder
from hfedmoe.runs.identity import (
    DEPLOYED,
    SIMULATED,
    Identity,
    check_identity,
    identity_of,
    read_identity,
    write_identity,
)
from hfedmoe.runs.log import logging_to
from hfedmoe.runs.paths import with_absolute_paths
from hfedmoe.server.keeper import Keeper
from hfedmoe.server.server import Server, server_app
from hfedmoe.wire.inprocess import InProcessGrid, changed_contexts, restore_contexts


def run(
    config: RunConfig, out: Path | None, watcher: Watcher, begun: Callable[[Path], None] = lambda folder: None
) -> Path:
    """Run a federation from its first round; returns the run folder. `begun` is told the folder when it is there.

    Raises:
        UserError: the configuration, model, data or folder cannot be used, or too few clients gave a valid update.
    """
    config = with_absolute_paths(config)
    with RunFolder.create(out, config) as folder:
        begun(folder.path)
        try:
            prepared = prepare(config, watcher)
            parts = _split(prepared, watcher)
        except UserError:
            folder.discard()  # nothing has run: the same folder can be used again
            raise
        if prepared.settled is not config:
            folder.settle(prepared.settled)
        write_identity(folder.path, _identity(prepared))
        folder.describe(prepared.about(parts))
        _run(folder, prepared, parts, None, watcher)
        return folder.path


def resume(path: Path, watcher: Watcher) -> Path:
    """Continue a run from its last checkpoint; without any checkpoint, start it again.

    Raises:
        UserError: not a run folder, in use by another process, or as `run`.
    """
    with RunFolder.open(path, to_write=True) as folder:
        was = read_identity(path)
        if was is not None and was.carrier == DEPLOYED:
            raise UserError(
                f"{path}: this run used real devices, which keep their own memory, so it cannot continue here; "
                f"`hfedmoe serve --resume {path}` continues a run of `hfedmoe serve`; one of `flwr run` continues by "
                "itself while its SuperLink runs, else start again with `flwr run` and its config.toml"
            )
        prepared = prepare(folder.config, watcher)
        check_identity(path, _identity(prepared))
        if was is None:
            write_identity(path, _identity(prepared))
        round = None
        if folder.saved_rounds():
            round = folder.load_checkpoint("last").round
        folder.rewind(-1 if round is None else round)
        _run(folder, prepared, _split(prepared, watcher), round, watcher)
        return folder.path


def _identity(prepared: Prepared) -> Identity:
    return identity_of(prepared.config, prepared.task, prepared.watch, SIMULATED)


def _split(prepared: Prepared, watcher: Watcher) -> list[list[int]]:
    watcher.phase("splitting the data over the clients")
    config = prepared.config
    return partition(prepared.task, config.partition, config.clients.count, config.seed)


def _run(
    folder: RunFolder, prepared: Prepared, parts: list[list[int]], from_round: int | None, watcher: Watcher
) -> None:
    for text in prepared.warnings:
        watcher.warning(text)
    # The checkpoints that are kept, the best one, and the one that is being written.
    size = sum(tensor.nbytes for tensor in prepared.initial.values())
    require_room(folder.path, size * (prepared.config.keep_checkpoints + 2))
    simulation = assemble(prepared, parts, folder, watcher, from_round)
    with logging_to(folder.path):
        simulation.run()
    keeper = simulation.server.keeper
    watcher.finish(f"done: {folder.path}")
    before, after = (keeper.scores[0], keeper.scores[-1]) if keeper.scores else (None, None)
    watcher.final_table(keeper.final_totals(), before, after)


@dataclass
class Simulation:
    """A server and its clients in one process."""

    server: Server
    devices: list[Device]
    grid: InProcessGrid

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
) -> Simulation:
    """Put a federation together.

    Args:
        parts: the rows of every client, as indices into `prepared.task.train`.
        folder: where the run is kept; None: nowhere.
        from_round: round of the checkpoint from which the run continues; None: it begins.

    Raises:
        UserError: the checkpoint is damaged or does not fit the model.
    """
    if METHODS[prepared.config.method.name].pooled:
        prepared, parts = pooled(prepared, parts)
    devices = _devices(prepared, parts, watcher)
    grid = InProcessGrid(client_app(lambda _, context: devices[int(context.node_config["partition-id"])]), len(devices))
    keeper = Keeper(folder, lambda: _to_tensors(changed_contexts(grid)), from_round)
    tensors = None
    if folder is not None and from_round is not None:
        checkpoint = folder.load_checkpoint(from_round)
        tensors = checkpoint.tensors
        with fitting(checkpoint):
            load_all(prepared.model, tensors)
        restore_contexts(grid, _to_bytes(checkpoint.clients or {}))
    return Simulation(server_for(prepared, keeper, watcher, tensors, from_round or 0), devices, grid)


def pooled(prepared: Prepared, parts: list[list[int]]) -> tuple[Prepared, list[list[int]]]:
    """One client with the rows of all, without limits, that takes as many steps in a round as they would together."""
    config = prepared.config
    asked = config.federation.clients_per_round or config.clients.count
    changes = {
        "clients": config.clients.model_copy(update={"count": 1, "budgets": ["100%"], "deadlines_s": None}),
        "federation": config.federation.model_copy(update={"clients_per_round": None, "min_clients": 1}),
        "train": config.train.model_copy(update={"steps": config.train.steps * asked}),
        "data": config.data.model_copy(update={"clients": None}),
    }
    one = replace(prepared, config=config.model_copy(update=changes), budgets=None)
    return one, [sorted(row for part in parts for row in part)]


def _devices(prepared: Prepared, parts: list[list[int]], watcher: Watcher) -> list[Device]:
    """Simulated clients. They share one model in memory; a client's sub-model is a mask over it."""
    steps = prepared.config.train.steps

    def on_step(client: int, step: int, loss: float) -> None:
        watcher.step(client, step, steps, loss)

    return [
        Device(
            number=number,
            name=f"client {number}",
            model=prepared.model,
            encoder=prepared.encoder,
            examples=[prepared.task.train[i] for i in indices],
            config=prepared.config,
            initial=prepared.initial,
            simulated=True,
            on_step=on_step,
            budget_experts=None if prepared.budgets is None else prepared.budgets[number],
        )
        for number, indices in enumerate(parts)
    ]


def _to_tensors(saved: dict[str, bytes]) -> dict[str, Tensor]:
    return {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in saved.items() if data}


def _to_bytes(saved: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in saved.items()}
