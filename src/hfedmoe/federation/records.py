"""What is written down of every round: the line in metrics.jsonl, the expert vectors, and the checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hfedmoe.evaluation import Metrics
from hfedmoe.federation.messages import Update
from hfedmoe.federation.prior import UsageMean
from hfedmoe.method.aggregation import routing_consistency
from hfedmoe.report.live import FinalLine, PaceLine, Score
from hfedmoe.runs import RunFolder

SaveClients = Callable[[], dict[str, Tensor]]


@dataclass
class RoundRecord:
    """One round as it goes on. Dictionaries are per client number."""

    round: int
    bytes_down: dict[int, int] = field(default_factory=dict)
    bytes_up: dict[int, int] = field(default_factory=dict)
    clients: dict[int, dict[str, Any]] = field(default_factory=dict)
    vectors: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    missing: dict[int, tuple[str, str]] = field(default_factory=dict)
    seconds: float = 0.0
    planning_seconds: float = 0.0
    evaluation_seconds: float = 0.0

    def sent(self, client: int, size: int) -> None:
        """Count bytes sent to a client."""
        self.bytes_down[client] = self.bytes_down.get(client, 0) + size

    def received(
        self, client: int, update: Update, resident: list[Tensor], size: int, activation_wanted: float
    ) -> None:
        """Note a valid update, but none of its tensors; the last argument is what a deadline may have lowered."""
        self.bytes_up[client] = self.bytes_up.get(client, 0) + size
        held = torch.cat(resident)
        self.clients[client] = {
            "examples": update.examples,
            "resident": int(held.sum()),
            "trained": sum(int(flags.sum()) for flags in update.trained),
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
        }
        self.vectors[client] = {
            "usage": torch.cat(update.usage),
            "importance": torch.cat(update.importance),
            "resident": held,
            "trained": torch.cat(update.trained),
        }

    def left_out(self, client: int, status: str, reason: str) -> None:
        """Note a client that gave no valid update."""
        self.missing[client] = (status, reason)
        self.clients[client] = {"status": status, "reason": reason}

    def note_consistency(self, num_experts: list[int], tau: float) -> None:
        """Note r(c) of eq. 18 for every client, the mean over the layers; it is reported and weighs nothing."""
        clients = sorted(self.vectors)
        layers = torch.stack([self.vectors[client]["usage"] for client in clients]).split(num_experts, dim=1)
        shares = torch.stack([routing_consistency(usage, tau) for usage in layers]).mean(0)
        for client, share in zip(clients, shares.tolist(), strict=True):
            self.clients[client]["routing_consistency"] = share

    def line(self, watched: Metrics | None, whole: Metrics | None) -> dict[str, Any]:
        """The round's line in metrics.jsonl."""
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
            "seconds_training": sum(client.get("seconds", 0.0) for client in self.clients.values()),
            "seconds_evaluation": self.evaluation_seconds,
            "short": bool(self.missing),
            "clients": [
                {
                    "client": number,
                    **facts,
                    "bytes_down": self.bytes_down.get(number, 0),
                    "bytes_up": self.bytes_up.get(number, 0),
                }
                for number, facts in sorted(self.clients.items())
            ],
        }


class Keeper:
    """Writes a federation's progress into its run folder, and knows it when the run is resumed.

    Args:
        folder: of the run; None keeps records in memory only (a server app without a folder).
        save_clients: what the clients of this process remember, to be saved with each checkpoint.
    """

    def __init__(self, folder: RunFolder | None, save_clients: SaveClients | None = None) -> None:
        self.folder = folder
        self._in_process = save_clients is not None
        self._save_clients = save_clients or (dict)
        self.lines: list[dict[str, Any]] = [] if folder is None else folder.read_rounds()
        self.scores: list[Score] = [
            _score(line["round"], line["evaluation"]["all"]) for line in self.lines if "all" in line["evaluation"]
        ]
        self._names: dict[int, str] = {}
        self.usage = UsageMean()
        """Of the federation, over all complete rounds."""
        if folder is not None and folder.config.method.bootstrap == "prior":
            self._recall_usage(folder)

    def _recall_usage(self, folder: RunFolder) -> None:
        history = folder.read_experts()
        if history is not None:
            rows = ((line["round"], row) for line in self.lines for row in line["clients"] if row["status"] == "ok")
            self.usage.add_rounds(history, {(round, row["client"]): row["examples"] for round, row in rows})

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
        num_experts: list[int],
        watched: Metrics | None,
        whole: Metrics | None,
    ) -> None:
        """Everything about a complete round; the checkpoint comes last, because it vouches for the rest."""
        clients = sorted(log.vectors)
        for client in clients:
            self.usage.add(log.vectors[client]["usage"], log.clients[client]["examples"])
        if self.folder is not None:
            rows = {
                key: torch.stack([log.vectors[client][key] for client in clients])
                for key in ("usage", "importance", "resident", "trained")
            }
            self.folder.append_experts(log.round, num_experts, clients, **rows)
        self._append(log.line(watched, whole))
        if whole is not None:
            self.scores.append(_score(log.round, vars(whole)))
        # Decision: the best checkpoint is chosen on the watched rows, which the final figures never use.
        self._checkpoint(log.round, tensors, watched or whole, whole)

    def failed(self, log: RoundRecord) -> None:
        """A round that too few clients completed: its line says so; the checkpoint before it stays the last."""
        self._append({**log.line(None, None), "failed": True})

    def final_lines(self) -> list[FinalLine]:
        """Per client, what it held at last, and what it trained, moved and used over the run."""
        lines = []
        for client in sorted(self._names):
            rows = [row for line in self.lines for row in line["clients"] if row["client"] == client]
            done = [row for row in rows if row["status"] == "ok"]
            if not done:
                continue
            predicted = [row["peak_bytes"] for row in done if row["peak_is"] == "predicted"]
            measured = [row["peak_bytes"] for row in done if row["peak_is"] == "measured"]
            lines.append(
                FinalLine(
                    name=self._names[client],
                    resident=done[-1]["resident"],
                    total_experts=self._total_experts(),
                    predicted_bytes=max(predicted, default=None),
                    trained=done[-1]["trained"],
                    bytes_down=sum(row["bytes_down"] for row in rows),
                    bytes_up=sum(row["bytes_up"] for row in rows),
                    peak_bytes=max(measured, default=None),
                    seconds=sum(row["seconds"] for row in done),
                    pace=_pace(done),
                )
            )
        return lines

    def _total_experts(self) -> int:
        history = None if self.folder is None else self.folder.read_experts()
        return 0 if history is None else int(sum(history.num_experts))

    def _append(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self.folder is not None:
            self.folder.append_round(line)

    def _checkpoint(
        self, round: int, tensors: dict[str, Tensor], judged: Metrics | None, whole: Metrics | None
    ) -> None:
        if self.folder is None:
            return
        score, metric = None, "accuracy"
        if judged is not None:
            score, metric = (judged.accuracy, "accuracy") if judged.accuracy is not None else (-judged.loss, "-loss")
        state = {"evaluation": None if whole is None else vars(whole)}
        self.folder.save_checkpoint(round, tensors, state, self._save_clients(), score, metric)


def _score(round: int, metrics: dict[str, Any]) -> Score:
    return Score(round, metrics["accuracy"], metrics["macro_f1"], metrics["loss"], metrics["examples"])


def _pace(rows: list[dict[str, Any]]) -> PaceLine | None:
    """What the deadline left of a client's rounds: sums of the steps, means over the rounds."""
    under = [row for row in rows if row.get("deadline_s") is not None]
    if not under:
        return None
    return PaceLine(
        steps=sum(row["steps"] for row in under),
        steps_wanted=sum(row["steps_wanted"] for row in under),
        activation=sum(row["activation"] for row in under) / len(under),
        activation_wanted=sum(row["activation_wanted"] for row in under) / len(under),
        deadline_s=under[-1]["deadline_s"],
    )
