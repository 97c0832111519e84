"""Folders of runs with known figures, written as a run writes them."""

from pathlib import Path
from typing import Any

import numpy as np

from hfedmoe.config import RunConfig
from hfedmoe.events import Participant
from hfedmoe.runs.about import About, Part
from hfedmoe.runs.folder import RunFolder

LABELS = ["acq", "earn"]
EXPERTS = [3, 2]
"""Of two layers."""


def entry(client: int, **other: Any) -> dict[str, Any]:
    """One client in one round, as in metrics.jsonl."""
    done = {
        "client": client,
        "status": "ok",
        "examples": 10 + client,
        "weight": 10 + client,
        "resident": 3,
        "trained": 2,
    }
    done |= {"total_experts": 5, "bytes_down": 1000, "bytes_up": 500, "peak_bytes": 2048, "peak_is_measured": False}
    return done | {"seconds": 1.5, "mean_loss": 1.25, "first_loss": 2.0, "last_loss": 1.0, **other}


def figures(accuracy: float, loss: float = 1.0) -> dict[str, Any]:
    return {"accuracy": accuracy, "macro_f1": accuracy / 2, "loss": loss, "examples": 4, "perplexity": 3.0}


def small_run(path: Path, **settings: Any) -> Path:
    """Two rounds of two clients; the second client is late in the second round, and nobody trains the last expert."""
    with RunFolder.create(path, RunConfig(**settings)) as folder:
        parts = [Part(0, "north.csv", 10, [9, 1]), Part(1, "south.csv", 11, [0, 11])]
        truth, texts = [0, 1, 1, 0], ["alpha <b>", "beta", "gamma", "delta"]
        machine = {"processor": "an abacus", "threads": 2, "device": "cpu", "memory_bytes": 2**34}
        folder.describe(About(machine, LABELS, parts, truth, texts))
        folder.note_clients({0: Participant("north.csv", 10, 4, 0.8)})
        folder.append_round(
            {"round": 0, "loss": 3.0, "evaluation": {"all": figures(0.25, 3.0)}, "clients": [], "short": False}
        )
        folder.append_answers(0, [1, 1, 0, 1])
        for round in (1, 2):
            late = (
                entry(1) if round == 1 else {"client": 1, "status": "late", "reason": "no answer", "bytes_down": 1000}
            )
            with folder.expert_rows(round, EXPERTS) as add:
                add(0, [0.5, 0.5, 0.0, 0.5, 0.5], np.full(5, 0.5), [1, 1, 0, 1, 1], [1, 1, 0, 1, 0])
                if round == 1:
                    add(1, [0.0, 0.0, 1.0, 0.5, 0.5], np.full(5, 0.25), [0, 0, 1, 1, 1], [0, 0, 1, 1, 0])
            found = {"watch": figures(0.5)} | ({"all": figures(0.75)} if round == 2 else {})
            line = {"round": round, "loss": 1.0, "evaluation": found, "bytes_down": 2000, "bytes_up": 1000}
            done = [entry(0, mean_loss=1.0 + round), late]
            folder.append_round(line | {"seconds": 60.0, "short": round == 2, "clients": done})
        folder.append_answers(2, [0, 1, 0, 0])
    return path
