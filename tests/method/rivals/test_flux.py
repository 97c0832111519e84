"""A client exploits the best experts and explores others."""

from dataclasses import replace

import pytest
import torch
from tests.federation import tiny_config
from torch import Tensor

from hfedmoe.client.history import ClientHistory
from hfedmoe.client.place import Place
from hfedmoe.config import MethodConfig
from hfedmoe.method.methods import METHODS
from hfedmoe.method.rivals.flux import explore
from hfedmoe.method.row import Outlook, Settings

SCORES = [
    [9.0, 1.0, 2.0, 3.0],
    [0.01, 0.08, 0.02, 0.07],
]  # by the mean of their layer: 2.4, .. and .., 1.8, .., 1.6


def held(budget: int, progress: float, seed: int, top_k: int = 1, **options: float) -> Tensor:
    contribution = [torch.tensor(layer) for layer in SCORES]
    draws = torch.Generator().manual_seed(seed)
    outlook = Outlook([4, 4], [top_k] * 2, budget, lambda: contribution, draws, progress)
    return torch.stack(explore(outlook, MethodConfig(name="flux", options=options))).int()


def test_half_of_the_budget_exploits_at_first_and_nearly_all_of_it_at_the_end() -> None:
    first = [held(4, 0.0, seed) for seed in range(20)]
    assert all(int(layers.sum()) == 4 for layers in first)
    assert all(layers[0, 0] and layers[1, 1] for layers in first)  # 0.5 x 4: the best two of all
    assert torch.stack(first).sum(0).min() > 0  # everything is explored
    # 0.9 x 4 is 4 after rounding: the best four of all, 9, 0.08, 0.07 and 3 (0.8 of its layer's mean).
    assert all(held(4, 1.0, seed).tolist() == [[1, 0, 0, 1], [0, 1, 0, 1]] for seed in range(5))
    # Half way: 0.7 x 4 is 3.
    assert all(held(4, 0.5, seed)[1].tolist()[1::2] == [1, 1] for seed in range(5))
    constant = [held(4, 1.0, seed, exploit_last=0.5) for seed in range(20)]
    assert torch.equal(torch.stack(constant), torch.stack(first))


@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_top_k_of_every_layer_and_a_budget_for_all(progress: float) -> None:
    assert all(held(4, progress, seed, top_k=2).sum(1).tolist() == [2, 2] for seed in range(5))
    assert held(8, progress, 0).tolist() == [[1] * 4] * 2


@pytest.mark.parametrize(("rounds", "expected"), [(3, [0.0, 0.5, 1.0]), (1, [0.0])])
def test_rows_are_told_how_far_the_run_is(rounds: int, expected: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def hold(outlook: Outlook, settings: Settings) -> list[Tensor]:
        seen.append(outlook.progress)
        return explore(outlook, settings)

    monkeypatch.setitem(METHODS, "flux", replace(METHODS["flux"], hold=hold))
    place = Place(0, "client 0", tiny_config("method.name=flux", f"federation.rounds={rounds}"), [4, 4], [1, 1])
    for round in range(1, rounds + 1):
        resident = place.plan(ClientHistory.new([4, 4]), round, None, lambda history: None)
        assert sum(int(keep.sum()) for keep in resident) == 2  # 25 % of 8
    assert seen == expected
