"""Make a configuration ready to run: load the model and the data, and check that they fit each other."""

import platform
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hfedmoe.client.batches import tokens_of
from hfedmoe.config import DataConfig, RunConfig
from hfedmoe.data.chat import DATED, ChatForm
from hfedmoe.data.decoding import PLAIN, Form
from hfedmoe.data.encoding import Encoder
from hfedmoe.data.example import Example
from hfedmoe.data.fits import check_task
from hfedmoe.data.known import known_set
from hfedmoe.data.partition import label_counts
from hfedmoe.data.task import Task
from hfedmoe.data.tasks import load_watched_task
from hfedmoe.data.terms import Terms, own_task, terms_of
from hfedmoe.device.allocator import give_back_freed_memory, keep_freed_memory, trim
from hfedmoe.device.capacity import budgets_in_experts
from hfedmoe.device.probe import processor_name, total_memory
from hfedmoe.errors import UserError
from hfedmoe.events import Watcher
from hfedmoe.files.disk import require_room
from hfedmoe.method.methods import METHODS
from hfedmoe.models.loaded import Loaded
from hfedmoe.models.loading import load, require_experts
from hfedmoe.models.wrapping import wrap
from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.payload import initial_tensors, load_all
from hfedmoe.report.told import held_out_words, loss_words, personal_words, tuning_words
from hfedmoe.runs.about import TEXTS, About, Part, cut
from hfedmoe.runs.checkpoints import Checkpoint
from hfedmoe.runs.choice import load_checkpoint
from hfedmoe.runs.folder import RunFolder
from hfedmoe.server.evaluation import Metrics, evaluate, room_of
from hfedmoe.server.keeper import Keeper
from hfedmoe.server.server import Server
from hfedmoe.wire.same import NO_DIGESTS, Digests


@dataclass
class Prepared:
    """A model and a task, ready for clients or for the server."""

    config: RunConfig
    model: MoEModel
    encoder: Encoder
    task: Task
    watch: list[Example]
    budgets: list[int] | None = None
    """Every client's budget in experts over all layers; None: unlimited, or a device that plans for itself."""
    warnings: list[str] = field(default_factory=list)
    """Warnings about the rows, for the start of a run."""

    @cached_property
    def initial(self) -> dict[str, Tensor]:
        """First values of the trained tensors (`payload.initial_tensors`). Read it before anything trains."""
        return initial_tensors(self.model)

    def about(self, parts: list[list[int]] | None, names: list[str] | None = None) -> About:
        """What a report says of a run besides its figures.

        Args:
            parts: the rows that every client trains on; None: only devices know.
            names: of the clients; None: those of the task, or numbers.
        """
        names = self.task.part_names if names is None else names
        counts = label_counts(self.task, parts or [])
        answered = bool(self.task.test[0].choices)
        shown = self.task.test[:TEXTS]
        return About(
            machine={
                "processor": processor_name(),
                "threads": torch.get_num_threads(),
                "device": str(self.model.device),
                "memory_bytes": total_memory(),
                "system": f"{platform.system()} {platform.release()}",
            },
            labels=list(self.task.labels),
            parts=[
                Part(number, f"client {number}" if names is None else names[number], len(rows), counts[number])
                for number, rows in enumerate(parts or [])
            ],
            truth=[row.answer for row in self.task.test] if answered else [],
            texts=[cut(row.text) for row in shown],
            choices=[list(map(cut, row.choices)) for row in shown] if answered and not self.task.labels else [],
        )

    @property
    def settled(self) -> RunConfig:
        """The configuration, with the kind of task and the labels found in the rows.

        An export needs them, and so does whoever measures or predicts where the rows of the run are not.
        """
        data = self.config.data
        found: dict[str, object] = {}
        if known_set(data) is None and data.format == "auto":
            found["format"] = self.task.kind
        if known_set(data) is None and data.labels is None and self.task.labels:
            found["labels"] = list(self.task.labels)
        return self.config if not found else self.config.model_copy(update={"data": data.model_copy(update=found)})

    def announce(self, watcher: Watcher, folder: RunFolder | None) -> None:
        """Say, before the first round, what a user should know of the rows and figures, and look for room on the disk.

        Args:
            folder: where the run is kept; None: nowhere.

        Raises:
            UserError: the disk has no room for the checkpoints.
        """
        for text in self.warnings:
            watcher.warning(text)
        if folder is not None:
            # The checkpoints that are kept, the best one, and the one that is being written.
            size = sum(tensor.nbytes for tensor in self.initial.values())
            require_room(folder.path, size * (self.config.keep_checkpoints + 2))
        watcher.note(held_out_words(self.task, len(self.watch), self.config.evaluation))
        watcher.note(loss_words(self.task, self.config.train.loss))
        if self.config.evaluation.personal_every:
            watcher.note(personal_words(self.config))
        if self.config.evaluation.tune_steps:
            watcher.note(tuning_words(self.config))

    def restore(self, folder: RunFolder, round: int) -> Checkpoint:
        """Put the trained tensors of a round's checkpoint into the model. Raises UserError if it does not fit."""
        checkpoint = folder.load_checkpoint(round)
        load_checkpoint(checkpoint, self.model)
        return checkpoint

    def with_config(self, config: RunConfig) -> "Prepared":
        """The same model and rows with other settings; also after training, `initial` is what it was before."""
        other = replace(self, config=config)
        other.initial = self.initial
        return other

    def measure(self, tensors: dict[str, Tensor], kind: str, on_batch: Callable[[int, int], None] | None) -> Metrics:
        """Evaluate these trained tensors on all held-out rows ("all") or on the watched ones ("watch")."""
        return self.measure_on(self.task.test if kind == "all" else self.watch, tensors, on_batch)

    def measure_on(
        self,
        rows: list[Example],
        tensors: dict[str, Tensor],
        on_batch: Callable[[int, int], None] | None = None,
        held: list[Tensor] | None = None,
    ) -> Metrics:
        """Evaluate these trained tensors on these rows.

        Args:
            held: bool [E] per layer: only with these experts; None: with all.
        """
        self.model.set_resident(None)
        load_all(self.model, tensors)
        if held is not None:
            self.model.set_resident(held)
        return self.measure_now(rows, on_batch)

    def measure_now(self, rows: list[Example], on_batch: Callable[[int, int], None] | None = None) -> Metrics:
        """Evaluate the model as it is on these rows; of a device, with the experts that are resident."""
        settings = self.config.evaluation
        try:
            return evaluate(
                self.model.model,
                rows,
                self.encoder,
                settings.batch_size,
                settings.scoring,
                on_batch,
                before_pass=lambda batch: self.model.count(tokens_of(batch)),
                among_choices=self.config.train.loss == "choices",
            )
        finally:
            self.model.count(None)


def prepare(
    config: RunConfig,
    watcher: Watcher,
    carve: bool = False,
    own: str | None = None,
    terms: Terms | None = None,
    form: Form = PLAIN,
    budgets: list[int] | None = None,
) -> Prepared:
    """Load the model and the data of a configuration and make them ready.

    Args:
        carve: for one device: experts stay on disk until they are resident, if there is a checkpoint to read them from.
            Otherwise all experts are in memory, for the server or for all simulated clients.
        own: a file with a device's own rows, instead of the configured data.
        terms: the run's task, which a device received from the server; None: found from the rows.
        form: how the device's own file is written.
        budgets: every client's, as they were planned elsewhere (`Prepared.budgets`); None: planned here.

    Raises:
        UserError: the model or the data cannot be used, or a budget is below what the model needs.
    """
    if carve:
        give_back_freed_memory()
    else:
        keep_freed_memory()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    require_experts(config.model)
    watcher.phase("reading the data")
    watch: list[Example] = []
    if own is not None and terms is not None:
        task = own_task(own, config.data, terms, form)
    else:
        task, watch = load_watched_task(config.data, config.partition, config.seed, config.evaluation.watch_rows)
    watcher.phase(f"loading {config.model.name}")
    loaded = load(config.model, config.seed, carve)
    config = with_chat_date(config, loaded.tokenizer, task, None if terms is None else terms.chat_date)
    model = wrap(loaded.model, config, loaded.store, masked=not carve)
    encoder = encoder_of(loaded, task, config.data)
    if terms is not None:
        encoder.first_token_only = terms.first_token_only
    problem = model.router_gradient_problem()
    if problem is not None:
        raise UserError(problem)
    method = METHODS[config.method.name]
    if not carve and budgets is None and (not method.ignores_budgets(config.method) or method.limits_otherwise):
        top_k = [layer.top_k for layer in model.layers]
        budgets = budgets_in_experts(config, model.num_experts, top_k, str(model.device))
    if (config.train.loss == "choices" or config.train.logit_adjustment) and not encoder.first_token_only:
        raise UserError(
            'train.loss = "choices" and train.logit_adjustment need labels that differ in their first token; '
            "set data.label_words, or leave both settings out"
        )
    if config.evaluation.scoring == "first_token" and not _first_tokens_differ(task, watch, encoder):
        raise UserError(
            "evaluation.scoring=first_token: some choices begin with the same token; use loglikelihood or auto"
        )
    warnings = check_task(task, watch, encoder, room_of(model.model, encoder.tokenizer))
    if carve:
        trim()
    return Prepared(config, model, encoder, task, watch, budgets, warnings)


def _first_tokens_differ(task: Task, watch: list[Example], encoder: Encoder) -> bool:
    """Whether the choices of every held-out row differ in their first token, which the final evaluation needs."""
    rows = [*task.test, *watch]
    return task.kind == "completion" or not rows or encoder.distinct_first_tokens(rows)


def encoder_of(loaded: Loaded, task: Task, config: DataConfig) -> Encoder:
    """The encoder of a task for a loaded model."""
    encoder = Encoder.for_task(
        loaded.tokenizer, task, config.max_tokens, loaded.encoder_decoder, loaded.decoder_start_token_id
    )
    encoder.chat = ChatForm.of(config)
    return encoder


def with_chat_date(config: RunConfig, tokenizer: Any, task: Task, told: str | None = None) -> RunConfig:
    """The configuration with a fixed date for its conversations, if the chat template writes one.

    Otherwise a run that is resumed on another day, or a device in another time zone, would get other tokens.

    Args:
        told: the date from the server; None: the date in the configuration, else today.
    """
    talks = any(example.messages for example in [*task.train[:1], *task.test[:1]])
    # A tokenizer may have several templates by name.
    if not talks or DATED not in str(getattr(tokenizer, "chat_template", "")):
        return config
    day = told or config.data.chat_date or date.today().isoformat()
    return config.model_copy(update={"data": config.data.model_copy(update={"chat_date": day})})


def server_for(
    prepared: Prepared,
    keeper: Keeper,
    watcher: Watcher,
    tensors: dict[str, Tensor] | None = None,
    round: int = 0,
    digests: Digests = NO_DIGESTS,
) -> Server:
    """The server of a federation, in process or on a network.

    Args:
        tensors: the global tensors after `round`; None: those of the loaded model.
        round: the last complete round.
        digests: of base model and tokenizer, if clients have copies of their own.
    """
    model = prepared.model
    if digests.base and prepared.config.carrier.kind != "process":
        watcher.warning(f'carrier.kind = "{prepared.config.carrier.kind}" is ignored: the clients are devices')
    return Server(
        config=prepared.config,
        tensors=dict(prepared.initial) if tensors is None else tensors,
        num_experts=model.num_experts,
        top_k=[layer.top_k for layer in model.layers],
        evaluate=lambda state, kind: prepared.measure(state, kind, watcher.evaluating),
        keeper=keeper,
        watcher=watcher,
        terms=terms_of(prepared.task, prepared.config.data, prepared.encoder.first_token_only).to_json(),
        digests=digests,
        watches=bool(prepared.watch),
        round=round,
    )
