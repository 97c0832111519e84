"""A method as a row of choices."""

import pytest
import torch

from hfedmoe.config import MethodConfig
from hfedmoe.method.copies import Copies
from hfedmoe.method.methods import METHODS
from hfedmoe.method.row import CannotHoldError, Outlook

CONTRIBUTION = [torch.tensor([0.1, 0.9, 0.5, 0.2]), torch.tensor([0.8, 0.3, 0.4, 0.7])]


def outlook(budget: int, contribution: list[torch.Tensor] | None = None, seed: int = 0) -> Outlook:
    def scores() -> list[torch.Tensor]:
        if contribution is None:
            pytest.fail("no scores were needed")
        return contribution

    return Outlook([4, 4], [1, 1], budget, scores, torch.Generator().manual_seed(seed))


def test_hfedmoe_holds_the_best_within_its_budget_and_all_without_asking_for_scores() -> None:
    held = METHODS["hfedmoe"].hold(outlook(3, CONTRIBUTION), MethodConfig())
    assert [layer.tolist() for layer in held] == [[False, True, False, False], [True, False, False, True]]
    assert all(bool(layer.all()) for layer in METHODS["hfedmoe"].hold(outlook(8), MethodConfig()))


def test_random_numbers_are_the_clients_own() -> None:
    drawn = [METHODS["hfedmoe"].hold(outlook(4, seed=seed), MethodConfig(score="random")) for seed in (1, 1, 2)]
    assert all(torch.equal(one, other) for one, other in zip(drawn[0], drawn[1], strict=True))
    assert any(not torch.equal(one, other) for one, other in zip(drawn[0], drawn[2], strict=True))


def test_sums_that_grow_with_depth_do_not_decide_between_layers() -> None:
    deep = [CONTRIBUTION[0], CONTRIBUTION[1] * 1000]
    as_they_are = METHODS["hfedmoe"].hold(outlook(4, deep), MethodConfig(score="ib"))
    assert int(as_they_are[0].sum()) == 1  # the least that a layer must have
    shared = METHODS["hfedmoe"].hold(outlook(4, deep), MethodConfig(score="activation"))
    assert [int(layer.sum()) for layer in shared] == [2, 2]


@pytest.mark.parametrize("score", ["ib", "importance", "frequency", "activation", "reap", "taylor", "ghost", "random"])
def test_no_score_decides_between_layers_that_share_a_budget_evenly(score: str) -> None:
    """Neither a layer's scale nor how uneven its scores are decides."""
    for layers in ([[0.97, 0.01, 0.01, 0.01], [0.3, 0.2, 0.3, 0.2]], [[1e-6, 3e-6, 2e-6, 0.0], [8e3, 3e3, 4e3, 7e3]]):
        contribution = [torch.tensor(layer) for layer in layers]
        held = METHODS["hfedmoe"].hold(outlook(4, contribution), MethodConfig(score=score, layers="even"))
        assert [int(layer.sum()) for layer in held] == [2, 2]
        if score != "random":
            for kept, values in zip(held, contribution, strict=True):
                assert values[kept].min() >= values[~kept].max()
    odd = METHODS["hfedmoe"].hold(outlook(5, [torch.arange(4.0), torch.tensor([0.0, 1.0, 8.0, 9.0])]), _even("taylor"))
    assert [int(layer.sum()) for layer in odd] == [3, 2]  # over means: 1 / 1.5 is more than 1 / 4.5


def _even(score: str) -> MethodConfig:
    return MethodConfig(score=score, layers="even")


def test_fedavg_holds_everything_or_takes_no_part() -> None:
    method = METHODS["fedavg"]
    assert all(bool(layer.all()) for layer in method.hold(outlook(8), MethodConfig()))
    with pytest.raises(CannotHoldError, match="room for 7 of the 8 experts"):
        method.hold(outlook(7), MethodConfig())
    copies = Copies(
        5,
        usage=torch.tensor([1.0, 0.0]),
        importance=torch.tensor([1.0, 0.0]),
        tokens=torch.tensor([9.0, 0.0]),
        held=torch.tensor([True, True]),
        trained=torch.tensor([True, False]),
    )
    assert method.expert_weight(copies, MethodConfig()).tolist() == [5.0, 5.0]  # stale copies count
    assert float(method.gate_weight(copies, MethodConfig())) == 5.0
    ours = METHODS["hfedmoe"]
    assert ours.expert_weight(copies, MethodConfig()).tolist() == [5.0, 0.0]
    assert float(ours.gate_weight(copies, MethodConfig(gate="importance"))) == 1.0
    assert float(ours.gate_weight(copies, MethodConfig(gate="fedavg"))) == 5.0
    rows = ours.gate_rows(copies, MethodConfig(gate="rows"))
    assert rows is not None
    assert rows.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("name", METHODS)
def test_every_row_says_what_it_is(name: str) -> None:
    row = METHODS[name]
    assert "arXiv " in row.source or row.status in ("bound", "own")
    assert row.holds
    assert row.trains
    assert row.travels
    assert row.server
    assert MethodConfig(name=name).name == name


def test_options_are_the_methods_own() -> None:
    assert MethodConfig(name="fedprox", options={"mu": 0.5}).options == {"mu": 0.5}
    with pytest.raises(ValueError, match="hfedmoe has no option mu; it has none"):
        MethodConfig(options={"mu": 0.5})
    with pytest.raises(ValueError, match=r"mu = -1 must be from 0"):
        MethodConfig(name="fedprox", options={"mu": -1})
