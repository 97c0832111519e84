"""Experts held in 8 and 4 bit on the GPU beside the CPU: the values themselves, outputs and LoRA gradients."""

import copy

import pytest
import torch
from torch import Tensor

from hfedmoe.moe.experts.activation import Gate
from hfedmoe.moe.experts.frozen import SeparateBase
from hfedmoe.moe.experts.groups import group_pairs
from hfedmoe.moe.experts.kernel import LORA, ExpertMath, experts_forward
from hfedmoe.moe.experts.quantised import Stored, store_as
from hfedmoe.moe.experts.store import MATRICES, ExpertStore, HeldWeights
from hfedmoe.moe.experts.trained import TrainedExperts
from tests.cuda.comparing import BFLOAT16, BFLOAT16_GRADIENT, FLOAT32, assert_near, relative_error
from tests.cuda.steps import CPU
from tests.cuda.test_experts import swiglu

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")

QUANTISED = ("8bit", "4bit")
E, H, INNER, T, K, RANK = 4, 128, 64, 48, 2, 8
NEAR_TIES = 5e-3
"""Share of the values that may get the neighbouring code: the GPU divides by a block's largest value less exactly."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def moved(stored: Stored, device: torch.device) -> Stored:
    """The same codes and scales on another device."""
    other = copy.copy(stored)
    for name, value in vars(stored).items():
        if isinstance(value, Tensor):
            setattr(other, name, value.to(device))
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(64, 96), (3, 43), (130, 70), (1, 1)], ids=str)
@pytest.mark.parametrize("storage", QUANTISED)
def test_the_same_codes_are_the_same_values(
    storage: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    stored = store_as(normal(*shape), storage, torch.float32)
    there = moved(stored, device)(dtype)
    assert there.device == device
    assert there.dtype == dtype
    assert tuple(there.shape) == shape
    # In bfloat16 a value near the middle of two may be rounded to either.
    assert relative_error(there, stored(dtype)) < (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("shape", [(512, 640), (3, 43), (7, 5, 9)], ids=str)
@pytest.mark.parametrize("storage", QUANTISED)
def test_the_device_chooses_the_codes_of_the_cpu(storage: str, shape: tuple[int, ...], device: torch.device) -> None:
    values = normal(*shape)
    expected, found = (store_as(values.to(where), storage, torch.float32) for where in (CPU, device))
    assert found.nbytes == expected.nbytes
    found_values, expected_values = found(torch.float32).cpu(), expected(torch.float32)
    step = expected_values.abs().max() / (32 if storage == "8bit" else 3)  # more than the largest step of the code
    apart = (found_values - expected_values).abs()
    assert float(apart.max()) <= float(step)
    share = float((apart > 1e-5 * expected_values.abs().max()).float().mean())
    assert share <= max(NEAR_TIES, 1 / values.numel())
    errors = [float((own - values).norm()) for own in (found_values, expected_values)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


class InMemory:
    """A source of experts for one layer."""

    def __init__(self, stacks: dict[str, Tensor]) -> None:
        self.stacks = stacks

    def shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        return {name: tuple(stack.shape[1:]) for name, stack in self.stacks.items()}

    def read(self, layer: int, expert: int) -> dict[str, Tensor]:
        return {name: stack[expert] for name, stack in self.stacks.items()}


def computed(storage: str, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Output and gradients of a layer whose frozen weights a store holds."""
    draws = torch.Generator().manual_seed(4)
    stacks = {"up": normal(E, 2 * INNER, H) * 4, "down": normal(E, H, INNER, seed=1) * 4}
    store = ExpertStore(InMemory(stacks), [E], storage, dtype, device)
    store.reside([torch.ones(E, dtype=torch.bool)])
    up, down = (HeldWeights(store, 0, name, False) for name in MATRICES)
    shapes = {"up_a": (RANK, H), "up_b": (RANK, 2 * INNER), "down_a": (RANK, INNER), "down_b": (RANK, H)}
    pairs = {name: (torch.randn(E, *shape, generator=draws) * 0.1).to(device) for name, shape in shapes.items()}
    trained = TrainedExperts({name: pairs[name].mT if name.endswith("_b") else pairs[name] for name in LORA}, 2.0)
    index = torch.rand(T, E, generator=draws).topk(K, dim=1).indices.to(device)
    x = torch.randn(T, H, generator=draws).bfloat16().to(device, dtype).requires_grad_()
    weights = torch.rand(T, K, generator=draws).to(device).requires_grad_()
    groups = group_pairs(index.reshape(-1), E, K)
    leaves = trained.of([expert for expert, _, _ in groups.spans])
    math = ExpertMath(SeparateBase(up, down), Gate(swiglu, silu=True), 2.0)
    out = experts_forward(math, x, weights.reshape(-1), groups, trained.stacks, leaves)
    (out * torch.randn(out.shape, generator=draws).to(device, dtype)).sum().backward()
    found: dict[str, Tensor | None] = {"out": out, "grad x": x.grad, "grad weights": weights.grad}
    for name, own in trained.leaves.items():
        found |= {f"grad {name}.{expert}": leaf.grad for expert, leaf in enumerate(own)}
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("storage", ["same", "bfloat16", *QUANTISED])
def test_outputs_and_gradients(storage: str, dtype: torch.dtype, device: torch.device) -> None:
    bound = 1e-2 if storage in QUANTISED else FLOAT32  # some codes are those of the neighbours
    reference, found = computed(storage, CPU, torch.float32), computed(storage, device, dtype)
    if dtype == torch.float32:
        assert_near(found, reference, bound)
    else:
        assert_near(found, reference, BFLOAT16, BFLOAT16_GRADIENT)
