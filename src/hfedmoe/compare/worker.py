"""Compute one cell in this process."""

import hashlib
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import hfedmoe
from hfedmoe.compare.cells import Cell, Result, Round
from hfedmoe.compare.measuring import Measuring, hits, own_mix
from hfedmoe.config import RunConfig
from hfedmoe.data.partition import label_counts, partition
from hfedmoe.device.peak import peak_process_bytes
from hfedmoe.device.probe import processor_name
from hfedmoe.errors import UserError
from hfedmoe.events import ClientRound, Evaluation, Silent
from hfedmoe.method.methods import METHODS
from hfedmoe.models.digest import weights_digest
from hfedmoe.moe.model import MoEModel
from hfedmoe.prepare import Prepared, prepare
from hfedmoe.simulation import assemble


class Recorder(Silent):
    """Keeps what a table needs."""

    def __init__(self, rounds: int) -> None:
        self.rounds = {number: Round(number) for number in range(rounds + 1)}
        self.round = 0
        """The one that is running; 0 before the first."""
        self.last: dict[int, ClientRound] = {}
        self.held: dict[int, list[int]] = {}
        """Of each client: in how many rounds it held each expert, over all layers; `trained` likewise."""
        self.trained: dict[int, list[int]] = {}
        self.flops = self.expert_flops = 0.0
        """Of a token in the dense part of the model, and in an expert; set when the model is known."""
        self.experts_per_token = 1.0
        """Over all layers."""

    def round_started(self, round: int) -> None:
        """As `events.Watcher`."""
        self.round = round

    def evaluated(self, found: Evaluation) -> None:
        """As `events.Watcher`."""
        line = self.rounds[found.round]
        if found.kind == "watch":
            line.watch_accuracy, line.watch_macro_f1, line.watch_loss = found.accuracy, found.macro_f1, found.loss
        else:
            line.accuracy, line.macro_f1, line.loss = found.accuracy, found.macro_f1, found.loss

    def client_experts(self, round: int, client: int, held: Sequence[bool], trained: Sequence[bool]) -> None:
        """As `events.Watcher`."""
        for counts, bits in ((self.held, held), (self.trained, trained)):
            before = counts.get(client, [0] * len(bits))
            counts[client] = [number + bit for number, bit in zip(before, bits, strict=True)]

    def client_done(self, round: int, client: int, done: ClientRound) -> None:
        """As `events.Watcher`."""
        line = self.rounds[round]
        line.bytes_up += done.bytes_up
        line.bytes_down += done.bytes_down
        self.last[client] = done
        if done.status == "ok":
            line.clients += 1
            line.flops += self.flops * done.tokens / self.experts_per_token + self.expert_flops * done.tokens


def flops_of(model: MoEModel) -> tuple[float, float]:
    """FLOPs of training on a token: in the dense part of the model, and in one expert.

    Frozen weights cost a product forward and one backward, 4 FLOPs per weight. Attention scores, LoRA terms, first
    passes and evaluation are left out: they are the same, or nearly, for all methods.
    """
    experts = sum(state.expert_bytes() * state.layer.num_experts for state in model.states)
    itemsize = next(model.model.parameters()).element_size()
    embedding = model.model.get_input_embeddings().weight.numel()
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    every = sum(p.numel() for p in model.model.parameters())
    dense = every - experts / itemsize - (0 if tied else embedding)
    one = fmean(state.expert_bytes() / itemsize for state in model.states)
    return 4.0 * dense, 4.0 * one


def compute(cell: Cell) -> Result:
    """Run the federation of a cell, measured as `Measuring` does.

    Raises:
        UserError: as `simulation.run`.
    """
    started = time.perf_counter()
    evaluation = cell.config.evaluation.model_copy(update={"personal_every": 0})  # clients keep no rows back here
    config = cell.config.model_copy(update={"evaluation": evaluation})
    recorder = Recorder(config.federation.rounds)
    prepared = prepare(config, recorder)
    layers = prepared.model.layers
    recorder.flops, recorder.expert_flops = flops_of(prepared.model)
    recorder.experts_per_token = float(sum(layer.top_k for layer in layers))
    parts = partition(prepared.task, config.partition, config.clients.count, config.seed)
    simulation = assemble(prepared, parts, None, recorder)
    personal = bool(METHODS[cell.method].private)
    rows = [len(part) for part in parts]
    measuring = Measuring(prepared, simulation, rows, personal, lambda: recorder.round)
    simulation.server.evaluate = measuring
    simulation.run()
    nothing = [0] * sum(layer.num_experts for layer in layers)
    return Result(
        method=cell.method,
        seed=cell.seed,
        digest=cell.digest,
        config=config.model_dump(mode="json"),
        code=code_version(),
        machine=machine(),
        seconds=time.perf_counter() - started,
        peak_bytes=peak_process_bytes(),
        rounds=list(recorder.rounds.values()),
        client_rows=rows,
        client_accuracy=_of_clients(measuring, prepared, parts, with_prior=False),
        client_accuracy_prior=_of_clients(measuring, prepared, parts, with_prior=not personal),
        client_peak_bytes=[done.peak_bytes if done.status == "ok" else 0 for _, done in sorted(recorder.last.items())],
        personal=personal,
        test_rows=len(prepared.task.test),
        watch_rows=len(prepared.watch),
        layer_experts=[layer.num_experts for layer in layers],
        held=[recorder.held.get(client, nothing) for client in range(len(simulation.devices))],
        trained=[recorder.trained.get(client, nothing) for client in range(len(simulation.devices))],
        base=weights_digest(config),
    )


def _of_clients(measuring: Measuring, prepared: Prepared, parts: list[list[int]], *, with_prior: bool) -> list[float]:
    """Accuracy of each client's model under its own mix of labels; empty if rows have no labels."""
    task = prepared.task
    if not task.labels or not task.test:
        return []
    found = []
    for client, counts in enumerate(label_counts(task, parts)):
        metrics = measuring.last[client if measuring.personal else 0]
        found.append(own_mix(hits(metrics, task.test, counts if with_prior else None), task.test, counts))
    return found


def code_version() -> str:
    """Version of the package and digest of its source."""
    found = hashlib.sha256()
    root = Path(hfedmoe.__file__).parent
    for path in sorted(root.rglob("*.py")):
        found.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return f"{hfedmoe.__version__}+{found.hexdigest()[:12]}"


def machine() -> dict[str, Any]:
    """What the cell was computed on."""
    return {
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def work(config: Path, out: Path, errors: Path) -> None:
    """Read a configuration, compute its cell and write the result; the process ends with 2 if it cannot be computed.

    Args:
        errors: a file for all that the process says.
    """
    with errors.open("w") as stream:
        os.dup2(stream.fileno(), sys.stderr.fileno())
        os.dup2(stream.fileno(), sys.stdout.fileno())
    settings = RunConfig.model_validate_json(config.read_text(encoding="utf-8"))
    try:
        compute(Cell(settings.method.name, settings.seed, settings)).write(out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
