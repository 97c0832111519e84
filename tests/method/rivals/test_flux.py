"""Flux on numbers worked out by hand, and in a tiny federation."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hfedmoe.client.history import ClientHistory
from hfedmoe.client.merging import mixtures
from hfedmoe.config import MethodConfig
from hfedmoe.method.rivals.flux import hold_useful, merged
from hfedmoe.method.row import Outlook
from hfedmoe.models.tiny import tiny_model
from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.payload import MismatchError, pack
from hfedmoe.runs.folder import RunFolder
from tests.federation import Federation

QUICK = ("data.test_rows=6", "evaluation.watch_rows=1", "federation.rounds=1", "method.name=flux")


def settings(**options: float) -> MethodConfig:
    return MethodConfig(name="flux", options=options)


def outlook(budget: int, scores: Tensor, progress: float = 0.0, seed: int = 0) -> Outlook:
    draws = torch.Generator().manual_seed(seed)
    return Outlook([len(scores)], [1], budget, lambda: [scores], draws, progress)


def test_half_of_the_room_is_for_merged_experts() -> None:
    assert merged([8] * 4, 8, settings()) == [1] * 4
    assert merged([8] * 4, 16, settings()) == [2] * 4
    assert merged([8] * 4, 16, settings(merged=1.0)) == [3] * 4  # one is tuned at least
    assert merged([8] * 4, 16, settings(merged=0.0)) == [1] * 4  # tokens of absent experts must go somewhere
    assert merged([8] * 4, 32, settings()) == [0] * 4
    assert merged([8] * 4, 4, settings()) == [0] * 4  # only where one expert per token is enough


def test_the_most_useful_are_tuned() -> None:
    scores = torch.tensor([1.0, 9.0, 0.0, 4.0])
    held = hold_useful(outlook(3, scores), settings(merged=0.34, exploit_first=1.0))
    assert held[0].tolist() == [False, True, False, True]
    assert hold_useful(outlook(4, scores), settings())[0].tolist() == [True] * 4


def test_exploration_shrinks() -> None:
    scores = torch.arange(20.0)
    for progress, explored in ((0.0, 4), (0.5, 2), (1.0, 1)):  # of 8 tuned: a share of 0.5, 0.7, 0.9 exploits
        found = set()
        for seed in range(30):
            (held,) = hold_useful(outlook(16, scores, progress, seed), settings())
            assert int(held.sum()) == 8
            assert bool(held[12 + explored :].all())
            found |= set(held[: 12 + explored].nonzero()[:, 0].tolist())
        assert len(found) > 8
    (held,) = hold_useful(outlook(16, scores, 1.0), settings(exploit_last=1.0))
    assert held.nonzero()[:, 0].tolist() == list(range(12, 20))


def test_experts_are_merged_by_usage_within_groups_of_similar_router_rows() -> None:
    model = MoEModel(tiny_model(50, 0))
    for layer in model.layers:
        rows = torch.zeros(8, 64)
        rows[:, 0] = torch.tensor([0.0, 9.0, 0.1, 9.1, 50.0, 0.2, 9.2, 60.0])
        layer.router.weight.data.copy_(rows)
    resident = [torch.tensor([0, 0, 0, 0, 1, 0, 0, 1]).bool()] * 4
    usage = [torch.tensor([0.3, 0.2, 0.1, 0.1, 0.0, 0.0, 0.1, 0.2])] * 4
    (first, *_, last) = mixtures(model, resident, [2, 2, 2, 0], usage)
    assert last == []
    found = {tuple(one.experts): one.shares for one in first}
    assert found[0, 2, 5] == pytest.approx([0.75, 0.25, 0.0])
    assert found[1, 3, 6] == pytest.approx([0.5, 0.25, 0.25])
    assert all(len(one.experts) == 1 for one in mixtures(model, resident, [9, 1, 1, 1], None)[0])


def test_a_client_tunes_a_few_merges_the_others_and_sends_only_what_it_tuned(
    federation: Callable[..., Federation], tmp_path: object
) -> None:
    run = federation(*QUICK, "federation.rounds=2", 'clients.budgets=["25%","50%"]')
    seen: list[tuple[int, int]] = []
    for device in run.devices:
        honest = device.train

        def train(history, resident, tensors, round, honest=honest, device=device):  # type: ignore[no-untyped-def]
            assert all(len(rows) == 8 for name, rows in tensors.items() if name.startswith("experts."))
            update = honest(history, resident, tensors, round)
            assert history.usage is not None
            numbers = {state.merged.number for state in device.model.states if state.merged is not None}
            assert all(bool((~trained | keep).all()) for trained, keep in zip(update.trained, resident, strict=True))
            seen.append((int(torch.cat(resident).sum()), *numbers))
            return update

        device.train = train  # type: ignore[method-assign]
    run.run()
    assert seen == [(4, 1), (8, 2)] * 4  # a quarter of 32 experts: one tuned and one merged in each of four layers
    lines = RunFolder.open(tmp_path / "run").read_rounds()  # type: ignore[operator]
    assert [row["status"] for row in lines[-1]["clients"]] == ["ok"] * 4


def test_what_is_merged_must_have_been_sent(federation: Callable[..., Federation]) -> None:
    run = federation(*QUICK)
    device = run.devices[0]
    resident = [torch.arange(8) < 1] * 4
    with pytest.raises(MismatchError, match=r"shape \(1, 8, 64\), expected \(8, 8, 64\)"):
        device.train(ClientHistory.new([8] * 4), resident, pack(run.server.tensors, resident), 1)
