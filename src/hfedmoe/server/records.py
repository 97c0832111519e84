"""The record of a round in progress, until its line in metrics.jsonl is written."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from tempfile import SpooledTemporaryFile
from typing import Any

import torch
from torch import Tensor

from hfedmoe.events import ClientRound, Personal
from hfedmoe.method.gates import RoutingConsistency
from hfedmoe.server.evaluation import Metrics
from hfedmoe.server.phases import Phases
from hfedmoe.wire.messages import Update

AddRow = Callable[..., None]

IN_MEMORY = 1 << 20
"""Bytes of a round's client records that stay in memory; if there are more, all go to a temporary file."""
REASONS = 5
"""How many reasons of clients left out of a round are kept for the error message."""


def trained_loss(metrics: Metrics | None) -> dict[str, Any]:
    """The loss in a line of metrics.jsonl, as the clients train it, and what it compares the right answer with."""
    if metrics is None:
        return {"loss": None}
    if metrics.choice_loss is None:
        return {"loss": metrics.loss, "loss_among": "vocabulary"}
    return {"loss": metrics.choice_loss, "loss_among": "choices"}


class RoundRecord:
    """One round in progress. Client records may move to a file; bytes received and sent always stay in memory.

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
        self.personal: list[Personal] = []
        """What clients measured after the round, by number."""
        self.seconds = self.planning_seconds = self.evaluation_seconds = self.training_seconds = 0.0
        self.phases = Phases()
        self._consistency = RoutingConsistency(num_experts, tau)
        self._notes = SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 (until `close`)
        self._at: list[tuple[int, int]] = []
        """Client and place of every note. In mode async a client may have several."""

    def close(self) -> None:
        """Drop the client records."""
        self._notes.close()

    def sent(self, client: int, size: int) -> None:
        """Count bytes sent to a client."""
        self.bytes_down[client] = self.bytes_down.get(client, 0) + size

    def received(
        self,
        client: int,
        update: Update,
        resident: list[Tensor],
        size: int,
        weight: int,
        activation_wanted: float,
        own: tuple[int, int] | None = None,
        staleness: int = 0,
    ) -> ClientRound:
        """Note a valid update of `size` bytes, without its tensors.

        Args:
            weight: |D_c|, limited by `federation.max_weight`.
            activation_wanted: experts per layer that a step would train without a deadline.
            own: other bytes sent and received for this update; None: all of the client in this round.
            staleness: rounds that the model went on while the client worked.
        """
        down, up = own or (self.bytes_down.get(client, 0), self.bytes_up.get(client, 0))
        self.bytes_up[client] = self.bytes_up.get(client, 0) + size
        self.training_seconds += update.work.seconds
        held, trained = torch.cat(resident), torch.cat(update.trained)
        done = ClientRound(
            **asdict(update.work),
            client=client,
            weight=weight,
            resident=int(held.sum()),
            trained=int(trained.sum()),
            total_experts=len(held),
            tokens=sum(float(tokens.sum()) for tokens in update.tokens),
            activation_wanted=activation_wanted,
            staleness=staleness,
            bytes_down=down,
            bytes_up=up + size,
        )
        self._note(done, self._consistency.add(update.usage))
        self.add_row(client, torch.cat(update.usage), torch.cat(update.importance), held, trained)
        return done

    def left_out(self, client: int, status: str, reason: str, own: tuple[int, int] | None = None) -> ClientRound:
        """Note a client without a valid update; `own` as for `received`."""
        self.num_missing += 1
        if len(self.missing) < REASONS:
            self.missing[client] = reason
        down, up = own or (self.bytes_down.get(client, 0), self.bytes_up.get(client, 0))
        done = ClientRound(client=client, status=status, reason=reason, bytes_down=down, bytes_up=up)
        self._note(done, None)
        return done

    def clients(self) -> Iterator[ClientRound]:
        """The record of every client by number, with r(c) of eq. 18. All clients must have answered before."""
        for _, place in sorted(self._at):
            self._notes.seek(place)
            entry, counts = json.loads(self._notes.readline())
            if counts is not None:
                entry["routing_consistency"] = self._consistency.value(counts)
            yield ClientRound.from_json(entry)

    def line(self, watched: Metrics | None, whole: Metrics | None) -> dict[str, Any]:
        """The round's line in metrics.jsonl, without the clients."""
        shown = whole or watched
        return {
            "round": self.round,
            **trained_loss(shown),
            "accuracy": None if shown is None else shown.accuracy,
            "macro_f1": None if shown is None else shown.macro_f1,
            "evaluation": {name: m.figures() for name, m in (("watch", watched), ("all", whole)) if m is not None},
            "bytes_down": sum(self.bytes_down.values()),
            "bytes_up": sum(self.bytes_up.values()),
            "seconds": self.seconds,
            "seconds_planning": self.planning_seconds,
            "seconds_training": self.training_seconds,
            "seconds_evaluation": self.evaluation_seconds,
            "seconds_by_phase": self.phases.seconds,
            "short": bool(self.num_missing),
            **({"personal": [asdict(one) for one in self.personal]} if self.personal else {}),
        }

    def _note(self, done: ClientRound, counts: list[int] | None) -> None:
        self._at.append((done.client, self._notes.seek(0, 2)))
        self._notes.write(json.dumps([done.to_json(), counts]).encode() + b"\n")
