"""Compute one cell in this process: `python -m hfedmoe.compare.worker CONFIG.json RESULT.json`."""

import hashlib
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import hfedmoe
from hfedmoe.client.app import history_of
from hfedmoe.compare.cells import Cell, Result, Round
from hfedmoe.config import RunConfig
from hfedmoe.data.example import Example
from hfedmoe.data.partition import label_counts, partition
from hfedmoe.device.peak import peak_process_bytes
from hfedmoe.device.probe import processor_name
from hfedmoe.events import ClientRound, Evaluation, Silent
from hfedmoe.method.methods import METHODS
from hfedmoe.models.digest import weights_digest
from hfedmoe.moe.model import MoEModel
from hfedmoe.prepare import Prepared, prepare
from hfedmoe.simulation import Simulation, assemble


class Recorder(Silent):
    """Keeps what a table needs, and says on the output which round is done."""

    def __init__(self, rounds: int) -> None:
        self.rounds = {number: Round(number) for number in range(rounds + 1)}
        self.last: dict[int, ClientRound] = {}
        self.flops = self.expert_flops = 0.0
        """Of a token in the dense part of the model, and in an expert; set when the model is known."""
        self.experts_per_token = 1.0
        """Over all layers."""

    def evaluated(self, found: Evaluation) -> None:
        """As `events.Watcher`."""
        line = self.rounds[found.round]
        if found.kind == "watch":
            line.watch_accuracy = found.accuracy
        else:
            line.accuracy, line.macro_f1, line.loss = found.accuracy, found.macro_f1, found.loss
            print(f"round {found.round}", flush=True)

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
    """Run the federation of a cell, and measure every client's model at its end.

    Raises:
        UserError: as `simulation.run`.
    """
    started = time.perf_counter()
    config = cell.config
    recorder = Recorder(config.federation.rounds)
    prepared = prepare(config, recorder)
    layers = prepared.model.layers
    recorder.flops, recorder.expert_flops = flops_of(prepared.model)
    recorder.experts_per_token = float(sum(layer.top_k for layer in layers))
    parts = partition(prepared.task, config.partition, config.clients.count, config.seed)
    simulation = assemble(prepared, parts, None, recorder)
    simulation.run()
    peak = peak_process_bytes()
    personal = bool(METHODS[cell.method].private)
    result = Result(
        method=cell.method,
        seed=cell.seed,
        digest=cell.digest,
        config=config.model_dump(mode="json"),
        code=code_version(),
        machine=machine(),
        seconds=0.0,
        peak_bytes=peak,
        rounds=list(recorder.rounds.values()),
        client_peak_bytes=[done.peak_bytes if done.status == "ok" else 0 for _, done in sorted(recorder.last.items())],
        client_rows=[len(part) for part in parts],
        personal=personal,
        base=weights_digest(config),
    )
    _measure_clients(result, prepared, simulation, parts)
    result.seconds = time.perf_counter() - started
    return result


def _measure_clients(result: Result, prepared: Prepared, simulation: Simulation, parts: list[list[int]]) -> None:
    """Accuracy of each client's model under its own mix of labels; if models are personal, also over all rows."""
    task = prepared.task
    if not task.labels or not task.test:
        return
    by_label: dict[int, list[Example]] = {}
    for example in task.test:
        by_label.setdefault(example.answer, []).append(example)
    counts = label_counts(task, parts)
    recalls: list[dict[int, float]] = []
    for tensors in _models(simulation, len(parts), result.personal):
        recalls.append({label: _accuracy(prepared, tensors, rows) for label, rows in by_label.items()})
    for client, row in enumerate(counts):
        recall = recalls[client if result.personal else 0]
        known = {label: number for label, number in enumerate(row) if number and label in recall}
        total = sum(known.values())
        result.client_accuracy.append(sum(recall[label] * n for label, n in known.items()) / total if total else 0.0)
    if result.personal:
        shares = {label: len(rows) / len(task.test) for label, rows in by_label.items()}
        own = [sum(recall[label] * share for label, share in shares.items()) for recall in recalls]
        rows = result.client_rows
        result.rounds[-1].accuracy = sum(a * n for a, n in zip(own, rows, strict=True)) / sum(rows)
        result.rounds[-1].macro_f1 = result.rounds[-1].loss = None
        for line in result.rounds[1:-1]:  # of a model that nobody has
            line.accuracy = line.macro_f1 = line.loss = None


def _models(simulation: Simulation, clients: int, personal: bool) -> Iterator[dict[str, Tensor]]:
    """The tensors of every client's model, or of the one that all share."""
    server = simulation.server
    if not personal:
        yield server.tensors
        return
    everything = [torch.ones(number, dtype=torch.bool) for number in server.num_experts]
    for client in range(clients):
        history = history_of(simulation.grid.context(client + 1), simulation.devices[client].place)
        kept = history.private
        yield server.tensors if kept is None else kept.over(server.tensors, everything)


def _accuracy(prepared: Prepared, tensors: dict[str, Tensor], rows: list[Example]) -> float:
    some = replace(prepared, task=replace(prepared.task, test=rows))
    return some.measure(tensors, "all", None).accuracy or 0.0


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


def main(config: Path, out: Path) -> None:
    """Read a configuration, compute its cell and write the result."""
    settings = RunConfig.model_validate_json(config.read_text(encoding="utf-8"))
    compute(Cell(settings.method.name, settings.seed, settings)).write(out)


if __name__ == "__main__":
    from hfedmoe.errors import UserError

    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
