"""Dropout between the projections of an expert, as Switch Transformers have it."""

import pytest
import torch
from torch import Tensor

from hfedmoe.moe.experts.activation import Gate
from hfedmoe.moe.experts.frozen import SeparateBase, StackedWeights, base_of
from hfedmoe.moe.experts.groups import group_pairs
from hfedmoe.moe.experts.kernel import LORA, ExpertMath, experts_forward
from tests.moe.test_kernel import E, K, gate, problem


@pytest.mark.parametrize("silu", [True, False])
def test_gradients_are_those_of_the_same_mask(silu: bool) -> None:
    p = problem()
    how = ExpertMath(base_of(p["up"], p["down"]), Gate(gate, silu), scale=1.5, dropout=0.5)
    groups = group_pairs(p["index"].reshape(-1), E, K)
    assert [expert for expert, _, _ in groups.spans] == list(range(E))

    def forward(x: Tensor, weights: Tensor, *leaves: Tensor) -> Tensor:
        torch.manual_seed(0)
        stacks = {name: torch.stack([leaves[place + 4 * e] for e in range(E)]) for place, name in enumerate(LORA)}
        stacks = {name: stack.detach() for name, stack in stacks.items()}
        return experts_forward(how, x, weights, groups, stacks, list(leaves))

    leaves = [p[name][e].clone().requires_grad_() for e in range(E) for name in LORA]
    weights = p["weights"].reshape(-1).detach().requires_grad_()
    assert torch.autograd.gradcheck(forward, (p["x"].requires_grad_(), weights, *leaves), fast_mode=True)


def test_what_stays_is_scaled_up_so_that_the_mean_stays() -> None:
    one = torch.eye(8, dtype=torch.float64)[None]
    x = torch.rand(50, 8, dtype=torch.float64) + 1
    groups = group_pairs(torch.zeros(50, dtype=torch.int64), 1, 1)
    how = ExpertMath(SeparateBase(StackedWeights(one), StackedWeights(one)), Gate(lambda u: u), dropout=0.25)
    kept = experts_forward(how, x, torch.ones(50, dtype=torch.float64), groups, {}, []) / x
    assert set(kept.flatten().round(decimals=6).tolist()) == {0.0, round(4 / 3, 6)}
