"""Stored experts: bytes counted and bytes held, errors, the quantised expert forward beside a plain one."""

import gc
import sys
import weakref
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hfedmoe.errors import UserError
from hfedmoe.moe.experts.activation import Gate
from hfedmoe.moe.experts.frozen import SeparateBase, StackedWeights
from hfedmoe.moe.experts.groups import group_pairs
from hfedmoe.moe.experts.kernel import LORA, ExpertMath, experts_forward
from hfedmoe.moe.experts.quantised import Plain, Quantised4, Quantised8, Stored, store_as, stored_bytes
from hfedmoe.moe.experts.store import MATRICES, ExpertStore, HeldWeights

STORAGES = ("same", "float32", "bfloat16", "float16", "8bit", "4bit")
QUANTISED = {"8bit": Quantised8, "4bit": Quantised4}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def held(stored: Stored) -> dict[int, int]:
    """Address and bytes of all memory that the tensors reachable from `stored` keep alive."""
    tensors, seen, queue = [], set(), [stored]
    while queue:
        item: Any = queue.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            tensors.append(item)
        else:
            queue.extend(gc.get_referents(item))
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


shapes = st.lists(st.integers(1, 70), min_size=1, max_size=3).map(tuple)


@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from(STORAGES), st.sampled_from([torch.float32, torch.bfloat16]))
def test_bytes_from_the_shape_are_the_bytes_held(shape: tuple[int, ...], storage: str, dtype: torch.dtype) -> None:
    stored = store_as(normal(*shape), storage, dtype)
    assert stored.shape == shape
    assert stored.nbytes == stored_bytes(shape, storage, dtype) == sum(held(stored).values())
    back = stored(torch.float32)
    assert tuple(back.shape) == shape
    assert back.dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "storage", "expected"),
    [
        ((2048, 1024), "float32", 8 * 2**20),
        ((2048, 1024), "same", 4 * 2**20),
        ((2048, 1024), "8bit", 2 * 2**20 + 4 * 32768),  # a float32 scale per 64 values
        (
            (2048, 1024),
            "4bit",
            2**20 + 32768 + 4 * 128 + 4,
        ),  # a byte per 64 values, a float32 per 256 of them, the mean
        ((3, 43), "8bit", 129 + 4 * 3),
        ((3, 43), "4bit", 65 + 3 + 4 + 4),
        ((129,), "4bit", 258),
    ],
)
def test_bytes_by_hand(shape: tuple[int, ...], storage: str, expected: int) -> None:
    assert stored_bytes(shape, storage, torch.bfloat16) == expected
    assert store_as(normal(*shape), storage, torch.bfloat16).nbytes == expected


@pytest.mark.parametrize("storage", STORAGES)
def test_an_expert_of_a_stack_does_not_keep_the_stack(storage: str) -> None:
    stack = normal(4, 24, 40)
    stored = store_as(stack[2], storage, torch.float32)
    assert sum(held(stored).values()) == stored_bytes((24, 40), storage, torch.float32)
    assert not held(stored).keys() & {stack.untyped_storage().data_ptr()}


@pytest.mark.parametrize("storage", STORAGES)
def test_an_expanded_tensor_holds_what_is_counted(storage: str) -> None:
    stored = store_as(normal(1, 40).expand(24, 40), storage, torch.float32)
    assert sum(held(stored).values()) == stored.nbytes == stored_bytes((24, 40), storage, torch.float32)


@pytest.mark.parametrize("storage", ["bfloat16", "8bit", "4bit"])
def test_the_source_is_freed_and_nothing_is_cached(storage: str) -> None:
    source = normal(64, 96)
    alive, address = weakref.ref(source), source.untyped_storage().data_ptr()
    stored = store_as(source, storage, torch.float32)
    assert address not in held(stored)
    del source
    assert alive() is None
    before = held(stored)
    dequantised = weakref.ref(stored(torch.float32))
    assert dequantised() is None
    assert held(stored) == before


def test_a_tensor_that_needs_no_change_is_shared() -> None:
    source = normal(5, 6)
    assert store_as(source, "same", torch.float32)(torch.float32).data_ptr() == source.data_ptr()


def relative_error(tensor: Tensor, stored: Stored) -> float:
    """||W - stored W|| / ||W||, Frobenius norms; 0 for a zero tensor that is stored exactly."""
    exact = tensor.detach().double()
    error = (stored(torch.float32).double() - exact).norm().item()
    return error / exact.norm().item() if error else 0.0


@pytest.mark.parametrize(
    ("storage", "bound"), [("float32", 0), ("bfloat16", 0.0025), ("float16", 0.0004), ("8bit", 0.015), ("4bit", 0.12)]
)
def test_error_of_normal_weights(storage: str, bound: float) -> None:
    weight = normal(512, 300)
    error = relative_error(weight, store_as(weight, storage, torch.float32))
    assert bound / 4 <= error <= bound


@pytest.mark.parametrize("storage", QUANTISED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_quantised_as_the_library_does_it(storage: str, dtype: torch.dtype, transposed: bool) -> None:
    """More than one chunk, an odd number of blocks, a non-contiguous view: the same values, bit for bit."""
    weight = normal(500, 1101).t() if transposed else normal(1101, 500)
    if storage == "8bit":
        expected = functional.dequantize_blockwise(*functional.quantize_blockwise(weight.contiguous(), blocksize=64))
    else:
        expected = functional.dequantize_4bit(
            *functional.quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
        )
    assert torch.equal(store_as(weight, storage, dtype)(torch.float32), expected)
    rounded = store_as(weight, storage, dtype)(dtype)
    assert rounded.dtype == dtype
    torch.testing.assert_close(rounded.float(), expected, atol=1e-6, rtol=0.008)


@pytest.mark.parametrize("storage", QUANTISED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_difficult_tensors_survive(storage: str, dtype: torch.dtype) -> None:
    bound = 0.02 if storage == "8bit" else 0.15
    cases = {
        "zero": torch.zeros(8, 50),
        "constant": torch.full((8, 50), 3.0),
        "negative": torch.full((3, 3), -2.0),
        "one": torch.full((1, 1), 0.5),
        "tiny": normal(9, 77) * 1e-5,
        "zero blocks": torch.cat([torch.zeros(64, 3), normal(64, 3)]),
        "column step": normal(8, 150)[:, ::2],
    }
    for name, case in cases.items():
        weight = case.to(dtype)
        stored = store_as(weight, storage, dtype)
        assert stored(dtype).isfinite().all(), name
        assert relative_error(weight, stored) <= bound, name
        if name.startswith("zero"):  # 8 bit gives a zero beside other values as 6e-6 of the block's largest
            assert not stored(torch.float32)[weight == 0].any(), name


@pytest.mark.parametrize("storage", QUANTISED)
def test_vectors_are_never_quantised(storage: str) -> None:
    bias = normal(100)
    stored = store_as(bias, storage, torch.bfloat16)
    assert isinstance(stored, Plain)
    assert torch.equal(stored(torch.bfloat16), bias.bfloat16())


def test_parameters_are_stored_without_graph() -> None:
    for storage, kind in (("float32", Plain), *QUANTISED.items()):
        stored = store_as(torch.nn.Parameter(normal(8, 8)), storage, torch.float32)
        assert isinstance(stored, kind)
        assert not stored(torch.float32).requires_grad


@pytest.mark.parametrize("storage", QUANTISED)
def test_missing_package_is_the_users_to_mend(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert store_as(normal(4, 4), "bfloat16", torch.float32).nbytes == 32
    assert stored_bytes((4, 4), storage, torch.float32) > 0
    with pytest.raises(UserError) as error:
        store_as(normal(4, 4), storage, torch.float32)
    assert str(error.value) == (
        f'model.expert_dtype = "{storage}" needs bitsandbytes: pip install "hfedmoe[quantised]"'
    )


T, K, E, H, WIDTH, R = 30, 2, 5, 24, 20, 3


def gate(u: Tensor) -> Tensor:
    first, second = u.chunk(2, dim=-1)
    return torch.nn.functional.silu(first) * second


def run(up: Any, down: Any, dtype: torch.dtype) -> list[Tensor]:
    """Output and all gradients of an expert layer with these base weights: x, gate weights, LoRA."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    index = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    groups = group_pairs(index.reshape(-1), E, K)
    x, weights = draw(T, H), draw(T * K)
    shape = {"up_a": (R, H), "up_b": (2 * WIDTH, R), "down_a": (R, WIDTH), "down_b": (H, R)}
    stacks = {name: draw(E, *shape[name]) for name in LORA}
    leaves = [stacks[name][expert].detach().requires_grad_() for expert, _, _ in groups.spans for name in LORA]
    math = ExpertMath(SeparateBase(up, down), Gate(gate, silu=True), scale=1.5)
    out = experts_forward(math, x, weights, groups, {n: s.detach() for n, s in stacks.items()}, leaves)
    return [out, *torch.autograd.grad((out.float() * torch.arange(H)).sum(), [x, weights, *leaves])]


class InMemory:
    """One layer of experts in two stacks."""

    def __init__(self, up: Tensor, down: Tensor) -> None:
        self.stacks = {"up": up, "down": down}

    def shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        return {name: tuple(stack.shape[1:]) for name, stack in self.stacks.items()}

    def read(self, layer: int, expert: int) -> dict[str, Tensor]:
        return {name: stack[expert] for name, stack in self.stacks.items()}


def store_of(up: Tensor, down: Tensor, storage: str, dtype: torch.dtype) -> ExpertStore:
    """A store that holds all experts of one layer."""
    store = ExpertStore(InMemory(up, down), [len(up)], storage, dtype, torch.device("cpu"))
    store.reside([torch.ones(len(up), dtype=torch.bool)])
    return store


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "8bit", "4bit"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradients_equal_those_of_the_dequantised_weights(
    storage: str, transposed: bool, dtype: torch.dtype
) -> None:
    up, down = normal(E, 2 * WIDTH, H) * 10, normal(E, H, WIDTH, seed=1) * 10
    if transposed:
        up, down = up.mT.contiguous(), down.mT.contiguous()
    store = store_of(up, down, storage, dtype)
    got = run(*(HeldWeights(store, 0, name, transposed) for name in MATRICES), dtype)
    plain = [torch.stack([store.get(0, expert)[name](dtype) for expert in range(E)]) for name in MATRICES]
    expected = run(*(StackedWeights(stack, transposed) for stack in plain), dtype)
    for one, other in zip(got, expected, strict=True):
        assert one.abs().max() > 0
        assert torch.equal(one, other)


def test_held_weights_have_the_shape_of_the_product() -> None:
    store = store_of(normal(3, 6, 4), normal(3, 6, 4, seed=1), "same", torch.float32)
    straight, turned = HeldWeights(store, 0, "up", False), HeldWeights(store, 0, "up", True)
    assert (straight.num_experts, straight.rows, straight.columns) == (3, 6, 4)
    assert (turned.num_experts, turned.rows, turned.columns) == (3, 4, 6)
    assert torch.equal(turned(1, torch.float32), straight(1, torch.float32).t())
