"""What is written down of a round: by hand."""

import json
import math
from pathlib import Path

import pytest
import torch

from hfedmoe.events import Work
from hfedmoe.runs.folder import RunFolder
from hfedmoe.server.evaluation import Metrics
from hfedmoe.server.keeper import DECIDING, Keeper
from hfedmoe.wire.messages import Update
from tests.federation import tiny_config


def test_routing_consistency_and_losses_by_hand() -> None:
    """tau = 0.5: threshold 1/4 of 2 experts. Layer 0: S = {0, 1}, r = 1/2 and 1; layer 1: S = {0}, r = 1 and 1."""
    with Keeper(None).recording(1, [2, 2], tau=0.5) as log:
        for client, rows in enumerate(([[0.9, 0.1], [0.9, 0.1]], [[0.5, 0.5], [0.8, 0.2]])):
            vectors, flags = [torch.tensor(row) for row in rows], [torch.ones(2, dtype=torch.bool)] * 2
            work = Work(examples=5, steps=3, steps_wanted=3, first_loss=3.0, last_loss=2.0, mean_loss=2.4)
            update = Update({}, flags, flags, vectors, vectors, vectors, work)
            log.received(client, update, flags, 7, 5, 2.0)
        noted = list(log.clients())
    assert [done.routing_consistency for done in noted] == [0.75, 1.0]
    assert (noted[0].first_loss, noted[0].last_loss, noted[0].mean_loss, noted[0].bytes_up) == (3.0, 2.0, 2.4, 7)


def measured(accuracy: float | None, loss: float, rows: int = DECIDING) -> Metrics:
    return Metrics(accuracy, None, loss, rows, math.exp(loss))


@pytest.mark.parametrize(
    ("rounds", "best", "metric"),
    [
        ([(measured(0.9, 1.0), measured(0.1, 1.0)), (measured(0.1, 1.0), measured(0.9, 1.0))], 1, "accuracy"),
        ([(measured(None, 1.0), None), (measured(None, 2.0), None)], 1, "-loss"),
        ([(measured(0.9, 1.0, 12), None), (measured(0.1, 1.0, 12), measured(0.2, 1.0))], 2, "round"),
    ],
    ids=[
        "the watched rows decide, not those of the final figures",
        "without accuracy the lowest loss",
        "a dozen rows decide nothing",
    ],
)
def test_the_best_checkpoint(
    rounds: list[tuple[Metrics, Metrics | None]], best: int, metric: str, tmp_path: Path
) -> None:
    with RunFolder.create(tmp_path / "run", tiny_config()) as folder:
        keeper = Keeper(folder)
        for number, (watched, whole) in enumerate(rounds, 1):
            with keeper.recording(number, [2], 0.1) as log:
                keeper.save_round(log, {"shared.x": torch.ones(1)}, watched, whole)
        assert folder.load_checkpoint("best").round == best
        assert json.loads((folder.path / "best.json").read_text())["metric"] == metric
