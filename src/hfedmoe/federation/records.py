"""What is written down of every round: the line in metrics.jsonl, the expert vectors, and the checkpoint."""

import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from tempfile import SpooledTemporaryFile
from typing import Any

import torch
from torch import Tensor

from hfedmoe.errors import UserError
from hfedmoe.evaluation import Metrics
from hfedmoe.federation.messages import Update
from hfedmoe.federation.phases import Phases
from hfedmoe.federation.prior import UsageMean
from hfedmoe.method.aggregation import passes
from hfedmoe.report.live import FinalLine, PaceLine, Score
from hfedmoe.runs import RunFolder
from hfedmoe.runs.experts import of_round

SaveClients = Callable[[], dict[str, Tensor]]
AddRow = Callable[..., None]

IN_MEMORY = 1 << 20
"""Bytes of what is noted of a round's clients; more goes to a temporary file."""
REASONS = 5
"""Clients left out of a round of which the reason is remembered for the error message."""


class RoundRecord:
    """One round as it goes on. What is noted of a client leaves memory, but for the bytes it received and sent.

    Args:
        num_experts: E_l of every layer.
        tau: of the method; decides who uses an expert (eq. 18).
    """

    def __init__(self, round: int, num_experts: list[int], tau: float) -> None:
        self.round = round
        self.num_experts = num_experts
        self.add_row: AddRow = lambda *_: None
        """Takes a client's number and vectors (`RoundRows.add`)."""
        self.bytes_down: dict[int, int] = {}
        self.bytes_up: dict[int, int] = {}
        self.missing: dict[int, str] = {}
        self.num_missing = 0
        self.seconds = self.planning_seconds = self.evaluation_seconds = self.training_seconds = 0.0
        self.phases = Phases()
        self._tau = tau
        self._used = [torch.zeros(number, dtype=torch.bool) for number in num_experts]
        self._notes = SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 (until `close`)
        self._at: dict[int, int] = {}

    def close(self) -> None:
        """Forget what was noted of the clients."""
        self._notes.close()

    def sent(self, client: int, size: int) -> None:
        """Count bytes sent to a client."""
        self.bytes_down[client] = self.bytes_down.get(client, 0) + size

    def received(
        self, client: int, update: Update, resident: list[Tensor], size: int, activation_wanted: float
    ) -> None:
        """Note a valid update, but none of its tensors; the last argument is what a deadline may have lowered."""
        self.bytes_up[client] = self.bytes_up.get(client, 0) + size
        self.training_seconds += update.seconds
        held, trained = torch.cat(resident), torch.cat(update.trained)
        uses = [passes(usage, self._tau) for usage in update.usage]
        for used, here in zip(self._used, uses, strict=True):
            used |= here
        self._note(
            client,
            {
                "examples": update.examples,
                "resident": int(held.sum()),
                "trained": int(trained.sum()),
                "tokens": sum(float(tokens.sum()) for tokens in update.tokens),
                "first_loss": update.losses[0] if update.losses else None,
                "last_loss": update.losses[-1] if update.losses else None,
                "seconds": update.seconds,
                "peak_bytes": update.peak_bytes,
                "peak_is": "measured" if update.peak_is_measured else "predicted",
                "steps": update.steps,
                "steps_wanted": update.steps_wanted,
                "activation": update.activation,
                "activation_wanted": activation_wanted,
                "deadline_s": update.deadline_s,
                "status": "ok",
                "routing_consistency": [int(here.sum()) for here in uses],
            },
        )
        self.add_row(client, torch.cat(update.usage), torch.cat(update.importance), held, trained)

    def left_out(self, client: int, status: str, reason: str) -> None:
        """Note a client that gave no valid update."""
        self.num_missing += 1
        if len(self.missing) < REASONS:
            self.missing[client] = reason
        self._note(client, {"status": status, "reason": reason})

    def clients(self) -> Iterator[dict[str, Any]]:
        """What is noted of every client, by its number."""
        in_use = torch.tensor([int(used.sum()) for used in self._used]).clamp_min(1).float()
        for client in sorted(self._at):
            self._notes.seek(self._at[client])
            facts: dict[str, Any] = json.loads(self._notes.readline())
            if "routing_consistency" in facts:
                # r(c) of eq. 18, the mean over the layers; S_c is a part of S, so |S_c| is all it needs of a client.
                facts["routing_consistency"] = (torch.tensor(facts["routing_consistency"]) / in_use).mean().item()
            down, up = self.bytes_down.get(client, 0), self.bytes_up.get(client, 0)
            yield {"client": client, **facts, "bytes_down": down, "bytes_up": up}

    def line(self, watched: Metrics | None, whole: Metrics | None) -> dict[str, Any]:
        """The round's line in metrics.jsonl, without the clients."""
        shown = whole or watched
        return {
            "round": self.round,
            "loss": None if shown is None else shown.loss,
            "accuracy": None if shown is None else shown.accuracy,
            "macro_f1": None if shown is None else shown.macro_f1,
            "evaluation": {name: vars(m) for name, m in (("watch", watched), ("all", whole)) if m is not None},
            "bytes_down": sum(self.bytes_down.values()),
            "bytes_up": sum(self.bytes_up.values()),
            "seconds": self.seconds,
            "seconds_planning": self.planning_seconds,
            "seconds_training": self.training_seconds,
            "seconds_evaluation": self.evaluation_seconds,
            "seconds_by_phase": self.phases.seconds,
            "short": bool(self.num_missing),
        }

    def _note(self, client: int, facts: dict[str, Any]) -> None:
        self._at[client] = self._notes.seek(0, 2)
        self._notes.write(json.dumps(facts).encode() + b"\n")


@dataclass(slots=True)
class ClientTotals:
    """One client over the rounds that it completed; `steps` to `deadline_s` over those under a deadline."""

    rounds: int = 0
    resident: int = 0
    trained: int = 0
    predicted_bytes: int | None = None
    measured_bytes: int | None = None
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    paced: int = 0
    steps: int = 0
    steps_wanted: int = 0
    activation: float = 0.0
    activation_wanted: float = 0.0
    deadline_s: float = 0.0

    def add(self, row: dict[str, Any]) -> None:
        """Count a client's entry in a line of metrics.jsonl."""
        self.bytes_down += row["bytes_down"]
        self.bytes_up += row["bytes_up"]
        if row["status"] != "ok":
            return
        self.rounds += 1
        self.resident, self.trained = row["resident"], row["trained"]
        self.seconds += row["seconds"]
        if row["peak_is"] == "measured":
            self.measured_bytes = max(self.measured_bytes or 0, row["peak_bytes"])
        else:
            self.predicted_bytes = max(self.predicted_bytes or 0, row["peak_bytes"])
        if row.get("deadline_s") is not None:
            self.paced += 1
            self.steps += row["steps"]
            self.steps_wanted += row["steps_wanted"]
            self.activation += row["activation"]
            self.activation_wanted += row["activation_wanted"]
            self.deadline_s = row["deadline_s"]

    def pace(self) -> PaceLine | None:
        """What the deadline left of its rounds: sums of the steps, means over the rounds."""
        if not self.paced:
            return None
        wanted = self.activation_wanted / self.paced
        return PaceLine(self.steps, self.steps_wanted, self.activation / self.paced, wanted, self.deadline_s)


class Keeper:
    """Writes a federation's progress into its run folder, and knows it when the run is resumed.

    Args:
        folder: of the run; None keeps only sums in memory (a server app without a folder).
        save_clients: what those clients of this process remember that changed since it was last called, to be saved
            with each checkpoint.
        from_round: of the checkpoint from which the run goes on.

    Raises:
        UserError: experts.npy is damaged, or has not what method.bootstrap = "prior" needs of it.
    """

    def __init__(
        self, folder: RunFolder | None, save_clients: SaveClients | None = None, from_round: int | None = None
    ) -> None:
        self.folder = folder
        self._in_process = save_clients is not None
        self._save_clients = save_clients or (dict)
        self._last_saved = from_round
        self.scores: list[Score] = []
        self.totals: dict[int, ClientTotals] = {}
        """Of the clients that took part so far."""
        self._names: dict[int, str] = {}
        self._total_experts = 0
        self.usage = UsageMean()
        """Of the federation, over all complete rounds."""
        if folder is not None:
            self._recall(folder)

    def _recall(self, folder: RunFolder) -> None:
        rows = folder.read_expert_rows()
        if rows is not None and len(rows):
            self._total_experts = int((rows["usage"][0] == rows["usage"][0]).sum())  # NaN pads layers
        prior = folder.config.method.bootstrap == "prior"
        for line in folder.iter_rounds():
            if "all" in line["evaluation"]:
                self.scores.append(_score(line["round"], line["evaluation"]["all"]))
            examples = {row["client"]: row["examples"] for row in line["clients"] if row["status"] == "ok"}
            if prior and examples and not line.get("failed"):
                self.usage.add_round(_rows_of(folder, rows, line["round"], examples), examples)
            for row in line["clients"] if "bytes_down" in line else ():
                self.totals.setdefault(row["client"], ClientTotals()).add(row)

    @contextmanager
    def recording(self, round: int, num_experts: list[int], tau: float) -> Iterator[RoundRecord]:
        """The record of a round, until the block ends."""
        self._total_experts = sum(num_experts)
        with closing(RoundRecord(round, num_experts, tau)) as log:
            yield log

    @contextmanager
    def taking_rows(self, log: RoundRecord) -> Iterator[None]:
        """While clients answer: the expert vectors that the record is given count when the block ends well."""
        if self.folder is None:
            yield
            return
        with self.folder.expert_rows(log.round, log.num_experts) as log.add_row:
            yield

    @property
    def resume_hint(self) -> str:
        # Without its clients' memory in the checkpoint a run cannot go on as it would have.
        return (
            ""
            if self.folder is None or not self._in_process
            else f"; `hfedmoe resume {self.folder.path}` goes on from there"
        )

    def name_clients(self, names: dict[int, str]) -> None:
        """Remember the clients' names for the last table."""
        self._names = dict(names)

    def save_start(self, tensors: dict[str, Tensor], metrics: Metrics) -> None:
        """Round 0: the model before any training."""
        line: dict[str, Any] = {
            "round": 0,
            "loss": metrics.loss,
            "accuracy": metrics.accuracy,
            "macro_f1": metrics.macro_f1,
        }
        line |= {"evaluation": {"all": vars(metrics)}, "clients": [], "short": False}
        self._append(line)
        self.scores.append(_score(0, vars(metrics)))
        self._checkpoint(0, tensors, None, None)

    def save_round(
        self,
        log: RoundRecord,
        tensors: dict[str, Tensor],
        watched: Metrics | None,
        whole: Metrics | None,
    ) -> None:
        """Everything about a complete round; the checkpoint comes last, because it vouches for the rest."""
        self._append(log.line(watched, whole), self._counted(log))
        if whole is not None:
            self.scores.append(_score(log.round, vars(whole)))
        # Decision: the best checkpoint is chosen on the watched rows, which the final figures never use.
        self._checkpoint(log.round, tensors, watched or whole, whole)

    def failed(self, log: RoundRecord) -> None:
        """A round that too few clients completed: its line says so; the checkpoint before it stays the last."""
        self._append({**log.line(None, None), "failed": True}, self._counted(log))

    def final_lines(self) -> list[FinalLine]:
        """Per client, what it held at last, and what it trained, moved and used over the run."""
        return [
            FinalLine(
                name=self._names[client],
                resident=done.resident,
                total_experts=self._total_experts,
                predicted_bytes=done.predicted_bytes,
                trained=done.trained,
                bytes_down=done.bytes_down,
                bytes_up=done.bytes_up,
                peak_bytes=done.measured_bytes,
                seconds=done.seconds,
                pace=done.pace(),
            )
            for client, done in sorted(self.totals.items())
            if done.rounds and client in self._names
        ]

    def _counted(self, log: RoundRecord) -> Iterator[dict[str, Any]]:
        """The entries of a round's clients, each counted as it is written."""
        for row in log.clients():
            self.totals.setdefault(row["client"], ClientTotals()).add(row)
            yield row

    def _append(self, line: dict[str, Any], clients: Iterator[dict[str, Any]] | None = None) -> None:
        if self.folder is not None:
            self.folder.append_round(line, clients)
        for _ in clients or ():
            pass  # without a folder they are still to be counted

    def _checkpoint(
        self, round: int, tensors: dict[str, Tensor], judged: Metrics | None, whole: Metrics | None
    ) -> None:
        if self.folder is None:
            return
        score, metric = None, "accuracy"
        if judged is not None:
            score, metric = (judged.accuracy, "accuracy") if judged.accuracy is not None else (-judged.loss, "-loss")
        state = {"evaluation": None if whole is None else vars(whole)}
        self.folder.save_checkpoint(round, tensors, state, self._save_clients(), score, metric, self._last_saved)
        self._last_saved = round


def _rows_of(folder: RunFolder, rows: Any, round: int, clients: dict[int, int]) -> Any:
    """The rows of a round in experts.npy. Raises UserError if that of a client is missing."""
    own = None if rows is None else of_round(rows, round)
    missing = clients.keys() - (set() if own is None else set(own["client"].tolist()))
    if missing:
        raise UserError(
            f"{folder.path / 'experts.npy'}: has no row of client {min(missing)} in round {round}, and "
            'method.bootstrap = "prior" goes on from them; restore the file or start the run again'
        )
    return own


def _score(round: int, metrics: dict[str, Any]) -> Score:
    return Score(round, metrics["accuracy"], metrics["macro_f1"], metrics["loss"], metrics["examples"])
