"""Run a federation on this machine from a configuration: the embedded default behind `hfedmoe run`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from flwr.app import Context, RecordDict
from torch import Tensor

from hfedmoe.budgeting import budgets_in_experts
from hfedmoe.config import RunConfig
from hfedmoe.data.checks import Room, check_task
from hfedmoe.data.encoding import Encoder
from hfedmoe.data.known import known_set
from hfedmoe.data.partition import partition
from hfedmoe.data.rows import Example
from hfedmoe.data.tasks import Task, load_watched_task
from hfedmoe.device.allocator import give_back_freed_memory, keep_freed_memory, trim
from hfedmoe.errors import UserError
from hfedmoe.evaluation import Metrics, evaluate, longest_input, positions
from hfedmoe.federation.client import client_app
from hfedmoe.federation.device import Device
from hfedmoe.federation.inprocess import InProcessGrid, changed_contexts, restore_contexts
from hfedmoe.federation.keeper import Keeper
from hfedmoe.federation.server import Server, server_app
from hfedmoe.loading import Loaded, device_of, load
from hfedmoe.moe.anatomy import UnsupportedModelError
from hfedmoe.moe.compact import compute_in_float32, wants_float32
from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.payload import global_tensors, load_all
from hfedmoe.moe.shards import CheckpointError
from hfedmoe.moe.store import ExpertStore
from hfedmoe.places import with_absolute_paths
from hfedmoe.report.live import Watcher
from hfedmoe.runs import Checkpoint, RunFolder


@dataclass
class Prepared:
    """A model and a task, ready for clients or for the server."""

    config: RunConfig
    model: MoEModel
    encoder: Encoder
    task: Task
    watch: list[Example]
    budgets: list[int] | None = None
    """Experts over all layers of every client; None: unlimited, or a device that plans for itself."""
    warnings: list[str] = field(default_factory=list)
    """What is worth knowing about the rows before a run."""

    @property
    def settled(self) -> RunConfig:
        """The configuration with the kind of task that the rows turned out to be: an export says how it was asked."""
        data = self.config.data
        if data.format != "auto" or known_set(data) is not None:
            return self.config
        return self.config.model_copy(update={"data": data.model_copy(update={"format": self.task.kind})})

    def measure(self, tensors: dict[str, Tensor], kind: str, on_batch: Callable[[int, int], None] | None) -> Metrics:
        """The model with these trained tensors on all held-out rows ("all") or on the watched ones ("watch")."""
        self.model.set_resident(None)
        load_all(self.model, tensors)
        settings = self.config.evaluation
        rows = self.task.test if kind == "all" else self.watch
        return evaluate(self.model.model, rows, self.encoder, settings.batch_size, settings.scoring, on_batch)


def prepare(config: RunConfig, watcher: Watcher, carve: bool = False) -> Prepared:
    """Load the model and the data of a configuration and make them ready.

    Args:
        carve: for one device: experts stay on disk until they are resident, where there is a checkpoint to read them
            from. Otherwise all experts are in memory, for the server or for all simulated clients.

    Raises:
        UserError: the model or the data cannot be used, or a budget is below what the model needs.
    """
    if carve:
        give_back_freed_memory()
    else:
        keep_freed_memory()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    watcher.phase("reading the data")
    task, watch = load_watched_task(config.data, config.partition, config.seed, config.evaluation.watch_rows)
    watcher.phase(f"loading {config.model.name}")
    loaded = load(config.model, config.seed, carve)
    model = wrap(loaded.model, config, loaded.store, masked=not carve)
    encoder = encoder_of(loaded, task, config.data.max_tokens)
    problem = model.router_gradient_problem()
    if problem is not None:
        raise UserError(problem)
    budgets = None
    if config.method.residency == "budget" and not carve:
        top_k = [layer.top_k for layer in model.layers]
        budgets = budgets_in_experts(config, model.num_experts, top_k, str(model.device))
    if (config.train.loss == "choices" or config.train.logit_adjustment) and not encoder.first_token_only:
        raise UserError(
            'train.loss = "choices" and train.logit_adjustment need labels that differ in their first token; '
            "set data.label_words, or leave both settings out"
        )
    room = Room(positions(model.model), longest_input(model.model, encoder.tokenizer))
    warnings = check_task(task, watch, encoder, room)
    if carve:
        trim()
    return Prepared(config, model, encoder, task, watch, budgets, warnings)


def encoder_of(loaded: Loaded, task: Task, max_tokens: int) -> Encoder:
    """The encoder of a task for a model that was loaded."""
    return Encoder.for_task(loaded.tokenizer, task, max_tokens, loaded.encoder_decoder, loaded.decoder_start_token_id)


def wrap(model: object, config: RunConfig, store: ExpertStore | None = None, masked: bool = True) -> MoEModel:
    """Make a transformers model ready for training as configured.

    Args:
        store: of its experts, if the model does not have them; `masked`: all of them are held and masked.

    Raises:
        UserError: it is not a usable MoE, or the settings contradict each other.
    """
    settings = config.train
    if settings.experts == "frozen" and not settings.router and not settings.attention:
        raise UserError("nothing would be trained: set train.experts, train.router or train.attention")
    if settings.experts == "full" and config.model.expert_dtype not in ("same", "float32"):
        raise UserError(
            f'train.experts = "full" with model.expert_dtype = "{config.model.expert_dtype}": small updates would be '
            'rounded away; use "same", or train.experts = "lora"'
        )
    if settings.experts == "full" and config.model.dtype != "float32":
        raise UserError(
            f'train.experts = "full" with model.dtype = "{config.model.dtype}": small updates would be rounded away; '
            'use float32, or train.experts = "lora", whose adapters are float32'
        )
    dtype = getattr(torch, config.model.dtype)
    try:
        if wants_float32(config.model.compute, device_of(config.model.device), dtype, here=True):
            compute_in_float32(model)
        wrapped = MoEModel(
            model,
            experts=settings.experts,
            rank=settings.rank,
            alpha=settings.alpha,
            freeze_a=settings.lora == "freeze_a",
            router=settings.router,
            attention=settings.attention,
            seed=config.seed,
            off_budget=config.clients.off_budget,
            store=store,
            masked=masked,
        )
    except (UnsupportedModelError, CheckpointError) as error:
        raise UserError(f"model.name = {config.model.name}: {error}") from None
    if settings.gradient_checkpointing:
        wrapped.checkpoint_activations()
    return wrapped


def run(config: RunConfig, out: Path | None, watcher: Watcher) -> Path:
    """Run a federation from its first round; returns the run folder.

    Raises:
        UserError: the configuration, model, data or folder cannot be used, or too few clients gave a valid update.
    """
    config = with_absolute_paths(config)
    with RunFolder.create(out, config) as folder:
        try:
            prepared = prepare(config, watcher)
            parts = _split(prepared, watcher)
        except UserError:
            folder.discard()  # nothing has run: the same folder can be asked for again
            raise
        if prepared.settled is not config:
            folder.settle(prepared.settled)
        _run(folder, prepared, parts, None, watcher)
        return folder.path


def resume(path: Path, watcher: Watcher) -> Path:
    """Go on with a run from its last checkpoint; one killed before its first checkpoint starts again.

    Raises:
        UserError: not a run folder, in use by another process, or as `run`.
    """
    with RunFolder.open(path, to_write=True) as folder:
        prepared = prepare(folder.config, watcher)
        round = None
        if folder.saved_rounds():
            round = folder.load_checkpoint("last").round
        folder.rewind(-1 if round is None else round)
        _run(folder, prepared, _split(prepared, watcher), round, watcher)
        return folder.path


def evaluate_run(path: Path, which: str, watcher: Watcher) -> Metrics:
    """Measure a checkpoint ("last", "best" or a round's number) of a run on all its held-out rows.

    Raises:
        UserError: not a run folder, or no such checkpoint.
    """
    with RunFolder.open(path) as folder:
        checkpoint = checkpoint_of(folder, which)
        prepared = prepare(folder.config, watcher)
        return measure_checkpoint(prepared, checkpoint, watcher)


def measure_checkpoint(prepared: Prepared, checkpoint: Checkpoint, watcher: Watcher) -> Metrics:
    """A checkpoint on all held-out rows. Raises UserError if it does not fit the model."""
    with fitting(checkpoint):
        return prepared.measure(checkpoint.tensors, "all", watcher.evaluating)


@contextmanager
def fitting(checkpoint: Checkpoint) -> Iterator[None]:
    """Raises UserError where the block finds that the checkpoint does not fit the model."""
    try:
        yield
    except ValueError as error:
        raise UserError(
            f"{checkpoint.path}: does not fit the model ({error}); a run's config.toml must stay as it was begun with"
        ) from None


def checkpoint_of(folder: RunFolder, which: str) -> Checkpoint:
    """The checkpoint that "last", "best" or the number of a round names. Raises UserError if there is none."""
    numbered = which.isascii() and which.isdecimal()  # int() does not take every digit there is
    if which not in ("last", "best") and not numbered:
        raise UserError(f'checkpoint "{which}": expected last, best or the number of a round')
    return folder.load_checkpoint(int(which) if numbered else which)  # type: ignore[arg-type]


def _split(prepared: Prepared, watcher: Watcher) -> list[list[int]]:
    watcher.phase("splitting the data over the clients")
    config = prepared.config
    return partition(prepared.task, config.partition, config.clients.count, config.seed)


def _run(
    folder: RunFolder, prepared: Prepared, parts: list[list[int]], from_round: int | None, watcher: Watcher
) -> None:
    config, model = prepared.config, prepared.model
    for text in prepared.warnings:
        watcher.warning(text)
    initial = global_tensors(model)
    devices = make_devices(prepared, parts, initial, watcher)
    grid = InProcessGrid(client_app(lambda context: devices[int(context.node_config["partition-id"])]), len(devices))
    keeper = Keeper(folder, lambda: _to_tensors(changed_contexts(grid)), from_round)
    tensors = initial
    if from_round is not None:
        checkpoint = folder.load_checkpoint(from_round)
        tensors = checkpoint.tensors
        with fitting(checkpoint):
            load_all(model, tensors)
        restore_contexts(grid, _to_bytes(checkpoint.clients or {}))
    server = Server(
        config=config,
        tensors=tensors,
        num_experts=model.num_experts,
        top_k=[layer.top_k for layer in model.layers],
        evaluate=lambda state, kind: prepared.measure(state, kind, watcher.evaluating),
        keeper=keeper,
        watcher=watcher,
        watches=bool(prepared.watch),
        round=from_round or 0,
    )
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={}, series_id=0)
    server_app(lambda _: server)(grid, context)
    watcher.finish(f"done: {folder.path}")
    before, after = (keeper.scores[0], keeper.scores[-1]) if keeper.scores else (None, None)
    watcher.final_table(keeper.final_lines(), before, after)


def make_devices(
    prepared: Prepared, parts: list[list[int]], initial: dict[str, Tensor], watcher: Watcher
) -> list[Device]:
    """Simulated clients: they share one model in memory, and each one's sub-model is a mask over it."""
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
            initial=initial,
            on_step=on_step,
            budget_experts=None if prepared.budgets is None else prepared.budgets[number],
        )
        for number, indices in enumerate(parts)
    ]


def _to_tensors(saved: dict[str, bytes]) -> dict[str, Tensor]:
    return {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in saved.items() if data}


def _to_bytes(saved: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in saved.items()}
