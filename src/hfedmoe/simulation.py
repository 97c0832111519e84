"""Run a federation of simulated clients: what `hfedmoe run` does."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import Context, RecordDict
from torch import Tensor

from hfedmoe.client.app import history_of
from hfedmoe.client.device import Device
from hfedmoe.config import RunConfig
from hfedmoe.data.kept import FEWEST
from hfedmoe.device.probe import usable_cores
from hfedmoe.errors import UserError
from hfedmoe.events import Silent, Watcher
from hfedmoe.gains import Sites, site_gains
from hfedmoe.method.methods import METHODS
from hfedmoe.prepare import Prepared, prepare, server_for
from hfedmoe.report.told import alone_words
from hfedmoe.report.tracking.tracking import tracked
from hfedmoe.runs.folder import RunFolder
from hfedmoe.runs.identity import DEPLOYED, Identity, check_identity, read_identity, write_identity
from hfedmoe.runs.log import logging_to
from hfedmoe.runs.paths import with_absolute_paths
from hfedmoe.runs.refusals import require_trackers
from hfedmoe.server.evaluation import Metrics
from hfedmoe.server.keeper import Keeper
from hfedmoe.server.recall import last_held
from hfedmoe.server.server import Server, server_app
from hfedmoe.server.sites import with_tuning
from hfedmoe.simulated import WorkerApp, app_of, devices_of, identity, let_measure, predict_peaks, split
from hfedmoe.tuning import tune_clients
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
    require_trackers(config.tracking)
    config = with_absolute_paths(config)
    with RunFolder.create(out, config) as folder, ExitStack() as stack:
        begun(folder.path)
        try:
            cluster = stack.enter_context(_cluster(config, watcher))
            prepared = prepare(config, watcher)
            sites = _split(prepared, watcher, keeping=True)
        except UserError:
            folder.discard()  # nothing has run: the same folder can be used again
            raise
        if prepared.settled is not config:
            folder.settle(prepared.settled)
        write_identity(folder.path, identity(prepared, sites))
        folder.describe(prepared.about(sites.trained, sites.names))
        _run(folder, prepared, sites, None, watcher, cluster)
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
        require_trackers(folder.config.tracking)
        cluster = stack.enter_context(_cluster(folder.config, watcher))
        prepared = prepare(folder.config, watcher)
        check_identity(path, identity(prepared))
        # What was trained on before must not be measured now: an earlier version kept no rows back.
        sites = _split(prepared, watcher, keeping=was is None or was.own_rows > 0)
        if was is None:
            write_identity(path, identity(prepared, sites))
        round = None
        if folder.saved_rounds():
            round = folder.load_checkpoint("last").round
        folder.rewind(-1 if round is None else round)
        _run(folder, prepared, sites, round, watcher, cluster)
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


def _split(prepared: Prepared, watcher: Watcher, keeping: bool) -> Sites:
    watcher.phase("splitting the data over the clients")
    return split(prepared, keeping)


@dataclass(frozen=True)
class Workers:
    """Where clients work if not in this process: Ray, and the identity that the workers check."""

    cluster: Cluster
    identity: Identity


def _run(
    folder: RunFolder,
    prepared: Prepared,
    sites: Sites,
    from_round: int | None,
    watcher: Watcher,
    cluster: Cluster | None,
) -> None:
    prepared.announce(watcher, folder)
    alone = prepared.config.evaluation.alone and sites.measurable
    if alone:
        watcher.note(alone_words(len(sites.names)))
    small = [name for name, kept in zip(sites.names, sites.kept, strict=True) if not kept]
    if sites.measurable and small:
        shown = ", ".join(small[:5]) + (f" and {len(small) - 5} more" if len(small) > 5 else "")
        watcher.note(f"too few rows to keep some back, so not measured at the end: {shown} ({FEWEST} are needed)")
    workers = None if cluster is None else Workers(cluster, identity(prepared, sites))
    with logging_to(folder.path), tracked(prepared.settled, folder, watcher, from_round) as tracking:
        simulation = assemble(prepared, sites.trained, folder, watcher, from_round, sites.names, workers)
        _predict_peaks(simulation, prepared, watcher)
        tracking.follow(simulation.server.keeper)
        if prepared.config.evaluation.clients_measure:
            let_measure(prepared, simulation.devices, sites)
            simulation.server.shared = lambda client: prepared.measure_on(
                [prepared.task.train[row] for row in sites.kept[client]], simulation.model_of(client)
            )
        simulation.run()
        _measure_gains(prepared, sites, simulation, folder, alone, watcher, workers)
    watcher.finish(f"done: {folder.path}")
    simulation.server.keeper.show_totals(watcher)


def _predict_peaks(simulation: "Simulation", prepared: Prepared, watcher: Watcher) -> None:
    """Let every device say the peak that `hfedmoe plan` predicts for what it holds."""
    if simulation.server.round >= prepared.config.federation.rounds:
        return  # nobody trains any more
    try:
        predict_peaks(prepared, simulation.devices)
    except UserError as error:
        watcher.warning(f"peaks count only weights, gradients and the optimizer's state: {error}")


def _measure_gains(
    prepared: Prepared,
    sites: Sites,
    simulation: "Simulation",
    folder: RunFolder,
    alone: bool,
    watcher: Watcher,
    workers: Workers | None,
) -> None:
    """What each site gained: in the run folder already, or measured and written there."""
    last, keeper = prepared.config.federation.rounds, simulation.server.keeper
    steps = prepared.config.evaluation.tune_steps
    if keeper.knows_sites(last) or not (sites.measurable or steps):
        return
    tuned = tune_clients(simulation.server, simulation.grid, folder) if steps else {}
    simulation.grid.close()
    by_itself = _trained_alone(prepared, sites, watcher, workers).model_of if alone else None
    whole = METHODS[prepared.config.method.name].no_own_model
    held = {} if whole else last_held(folder, prepared.model.num_experts)
    gains = site_gains(prepared, sites, simulation.model_of, by_itself, held, watcher)
    keeper.save_sites(last, with_tuning(gains, tuned, steps))


def _trained_alone(prepared: Prepared, sites: Sites, watcher: Watcher, workers: Workers | None) -> "Simulation":
    """A run in which every site keeps its model to itself; nothing is measured in it."""
    config = prepared.config
    limited = not METHODS[config.method.name].ignores_budgets(config.method)
    changes = {"name": "local", "options": {}, "residency": "budget" if limited else "all"}
    method = config.method.model_copy(update=changes)
    evaluation = config.evaluation.model_copy(update={"personal_every": 0})
    one = prepared.with_config(config.model_copy(update={"method": method, "evaluation": evaluation}))
    simulation = assemble(one, sites.trained, None, Alone(watcher, config.federation.rounds), workers=workers)
    simulation.server.evaluate = lambda tensors, kind: Metrics(None, None, 0.0, 0, 1.0)
    simulation.server.watches = False
    simulation.run()
    simulation.grid.close()
    return simulation


class Alone(Silent):
    """Says how far the training of the sites by themselves is."""

    def __init__(self, watcher: Watcher, rounds: int) -> None:
        self._watcher, self._rounds = watcher, rounds

    def round_started(self, round: int) -> None:
        """As `events.Watcher`."""
        self._watcher.phase(f"training every site by itself: round {round}/{self._rounds}")

    def warning(self, text: str) -> None:
        """As `events.Watcher`."""
        self._watcher.warning(f"training by itself: {text}")


@dataclass
class Simulation:
    """A server and its clients."""

    server: Server
    devices: list[Device]
    """Of all clients; workers of Ray have devices of their own, and these are what the server knows of them."""
    grid: LocalGrid

    def model_of(self, client: int, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The trained tensors of a client's model: those of the server, under what the client keeps of its own.

        Args:
            tensors: of the server; None: as they are now.
        """
        if len(self.devices) == 1:  # one client with the rows of all
            client = 0
        history = history_of(self.grid.context(client + 1), self.devices[client].place)
        everything = [torch.ones(number, dtype=torch.bool) for number in self.server.num_experts]
        tensors = self.server.tensors if tensors is None else tensors
        return tensors if history.private is None else history.private.over(tensors, everything)

    def run(self) -> None:
        """Run all remaining rounds. Raises UserError like `Server.run`."""
        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={}, series_id=0)
        server_app(lambda _: nullcontext(self.server))(self.grid, context)


def assemble(
    prepared: Prepared,
    parts: list[list[int]],
    folder: RunFolder | None,
    watcher: Watcher,
    from_round: int | None = None,
    names: list[str] | None = None,
    workers: Workers | None = None,
) -> Simulation:
    """Put a federation together.

    Args:
        parts: the rows of every client, as indices into `prepared.task.train`.
        folder: where the run is kept; None: nowhere.
        from_round: round of the checkpoint from which the run continues; None: it begins.
        names: of the clients; None: by number.
        workers: where the clients work; None: in this process.

    Raises:
        UserError: the checkpoint is damaged or does not fit the model.
    """
    whole = prepared
    prepared, devices = devices_of(
        prepared, parts, names, lambda client, step, loss: watcher.step(client, step, steps, loss)
    )
    steps = prepared.config.train.steps
    if workers is None:
        grid: LocalGrid = InProcessGrid(app_of(devices), len(devices))
    else:
        if prepared.model.device.type != "cpu" and not prepared.config.carrier.gpus_per_client:
            watcher.warning(
                f"this machine has {prepared.model.device}, but its clients work on CPUs; carrier.gpus_per_client "
                "gives them GPUs"
            )
        watcher.phase(f"{workers.cluster.at_once} workers load {prepared.config.model.name}")
        app = WorkerApp(whole.config, whole.budgets, workers.identity)
        grid = RayGrid(app, len(devices), workers.cluster, watcher, steps)
    keeper = Keeper(folder, lambda: _to_tensors(changed_contexts(grid)), from_round)
    tensors = None
    if folder is not None and from_round is not None:
        checkpoint = prepared.restore(folder, from_round)
        tensors = checkpoint.tensors
        restore_contexts(grid, _to_bytes(checkpoint.clients or {}))
    return Simulation(server_for(prepared, keeper, watcher, tensors, from_round or 0), devices, grid)


def _to_tensors(saved: dict[str, bytes]) -> dict[str, Tensor]:
    return {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in saved.items() if data}


def _to_bytes(saved: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in saved.items()}
