"""Records of rounds without a model: what a run would write, with figures that say which round they are of."""

from pathlib import Path
from typing import Any

import pytest

from hfedmoe.config import RunConfig
from hfedmoe.events import ClientRound, Silent
from hfedmoe.report.tracking.tracking import Tracking
from hfedmoe.runs.folder import RunFolder
from hfedmoe.runs.refusals import is_installed
from tests.federation import tiny_config

LABEL = "a-label-that-stays"


class Notes(Silent):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)


def needs(library: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not is_installed(library), reason=f"{library} is not installed: pip install 'hfedmoe[{library}]'"
    )


def config(to: str, *more: str) -> RunConfig:
    overrides = [f'tracking.to=["{to}"]', f'data.labels=["{LABEL}", "b"]', "federation.rounds=3", *more]
    return tiny_config(*overrides)


def loss_of(round: int) -> float:
    return 4.0 - round / 2  # exact also in float32


def line(round: int) -> dict[str, Any]:
    figures = {"accuracy": 0.25, "macro_f1": None, "loss": loss_of(round), "examples": 30}
    found: dict[str, Any] = {"round": round, "evaluation": {"all": figures}}
    if round:
        found |= {"bytes_down": 1000, "bytes_up": 100, "seconds": 2.0, "seconds_by_phase": {"average": 0.5}}
    return found


def clients(round: int) -> list[ClientRound]:
    if not round:
        return []
    return [
        ClientRound(client=0, weight=10, mean_loss=1.0, resident=8, trained=6, total_experts=32, steps=2, seconds=1.0),
        ClientRound(client=1, weight=30, mean_loss=2.0, resident=16, trained=8, total_experts=32, steps=2, seconds=3.0),
        ClientRound(client=2, status="late", reason=f"was reading {LABEL}", bytes_down=500),
    ]


def complete(folder: RunFolder, tracking: Tracking, *rounds: int) -> None:
    """Write rounds as the server does, and tell the trackers."""
    for round in rounds:
        folder.append_round(line(round), (done.to_json() for done in clients(round)))
        tracking.round(line(round), clients(round))


def tensorboard_series(run: Path, tag: str) -> list[tuple[int, float]]:
    """What the event files of a run have: (round, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def contents(*places: Path) -> bytes:
    """All bytes of all files."""
    return b"\n".join(path.read_bytes() for place in places for path in place.rglob("*") if path.is_file())
