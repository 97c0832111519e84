"""What is noted of a round while it goes on, until its line in metrics.jsonl is written."""

import json
from collections.abc import Callable, Iterator
from tempfile import SpooledTemporaryFile
from typing import Any

import torch
from torch import Tensor

from hfedmoe.method.aggregation import passes
from hfedmoe.server.evaluation import Metrics
from hfedmoe.server.phases import Phases
from hfedmoe.wire.messages import Update

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
