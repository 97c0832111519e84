"""The expert forward for GPUs, with torch's own grouped products and passes: the same as the general one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hfedmoe.moe.experts import kernel, layouts
from hfedmoe.moe.experts.activation import Gate
from hfedmoe.moe.experts.frozen import ExpertBase, SeparateBase, StackedWeights, base_of
from hfedmoe.moe.experts.groups import group_pairs
from hfedmoe.moe.experts.joined import JoinedExperts
from hfedmoe.moe.experts.kernel import ExpertMath, experts_forward
from hfedmoe.moe.experts.store import MATRICES, ExpertStore, HeldWeights
from hfedmoe.moe.experts.trained import TrainedExperts, lora_experts
from hfedmoe.moe.model import MoEModel
from tests.families.table import build, inputs

E, T, K, H, INNER = 6, 40, 2, 16, 24


@pytest.fixture
def joins(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Chooses between the forward for GPUs and the general one."""
    return lambda wanted: monkeypatch.setattr(kernel, "joins", lambda x, groups: wanted and groups.size > 0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def lora(rank: int, freeze_a: bool = False) -> TrainedExperts:
    trained = lora_experts(E, (2 * INNER, H), (H, INNER), rank, 12.0, 0, torch.device("cpu"), freeze_a)
    for name in ("up_b", "down_b"):
        trained.stacks[name].copy_(draw(*trained.stacks[name].shape))
    return trained


def step(base: ExpertBase, trained: TrainedExperts | None) -> tuple[Tensor, list[Tensor | None]]:
    """Outputs, and gradients of x, the weights and all leaves; expert 0 gets no token, and one pair no expert."""
    index = torch.randint(1, E, (T * K,), generator=torch.Generator().manual_seed(0))
    index[3] = E
    groups = group_pairs(index, E, K)
    x, w = draw(T, H).requires_grad_(), draw(T, K).softmax(-1).requires_grad_()
    norms = torch.zeros(T * K)
    math = ExpertMath(base, Gate(torch.nn.functional.silu, silu=True), scale=1.0 if trained is None else trained.scale)
    stacks, leaves = ({}, []) if trained is None else (trained.stacks, trained.of([e for e, _, _ in groups.spans]))
    out = experts_forward(math, x, w.reshape(-1), groups, stacks, leaves, norms)
    out.backward(draw(T, H))
    return torch.cat([out.detach().flatten(), norms]), [x.grad, w.grad, *(leaf.grad for leaf in leaves)]


def check(joins: Any, base: Callable[[], ExpertBase], trained: Callable[[], TrainedExperts | None]) -> None:
    joins(False)
    expected, expected_grads = step(base(), trained())
    joins(True)
    found, grads = step(base(), trained())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    for one, other in zip(grads, expected_grads, strict=True):
        if other is None:
            assert one is None
        else:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def stacks(transposed: bool) -> tuple[Tensor, Tensor]:
    up, down = draw(E, 2 * INNER, H), draw(E, H, INNER)
    return (up.mT.contiguous(), down.mT.contiguous()) if transposed else (up, down)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [0, 3, 8])
def test_it_gives_what_the_general_forward_gives(joins: Any, rank: int, transposed: bool) -> None:
    check(joins, lambda: base_of(*stacks(transposed), transposed), lambda: lora(rank) if rank else None)


def test_a_that_is_not_trained_gets_no_gradient(joins: Any) -> None:
    check(joins, lambda: base_of(*stacks(False)), lambda: lora(8, freeze_a=True))


@pytest.mark.parametrize("storage", ["same", "8bit", "4bit"])
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_held_one_by_one_move_to_one_piece_of_memory(joins: Any, storage: str, transposed: bool) -> None:
    check(joins, lambda: held(store_of(transposed, storage), transposed), lambda: lora(8))


def store_of(transposed: bool, storage: str) -> ExpertStore:
    store = ExpertStore(Source(transposed), [E], storage, torch.float32, torch.device("cpu"))
    store.reside([torch.ones(E, dtype=torch.bool)])
    return store


def held(store: ExpertStore, transposed: bool) -> ExpertBase:
    up, down = (HeldWeights(store, 0, name, transposed) for name in MATRICES)
    return SeparateBase(up, down)


class Source:
    """Reads the experts of `stacks`."""

    def __init__(self, transposed: bool) -> None:
        self._stacks = dict(zip(MATRICES, stacks(transposed), strict=True))

    def shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        return {name: tuple(stack.shape[1:]) for name, stack in self._stacks.items()}

    def read(self, layer: int, expert: int) -> dict[str, Tensor]:
        return {name: stack[expert] for name, stack in self._stacks.items()}


@pytest.mark.parametrize("storage", ["same", "4bit"])
def test_a_store_holds_others_after_its_experts_moved(joins: Any, storage: str) -> None:
    joins(True)
    store, fresh = store_of(False, storage), store_of(False, storage)
    step(held(store, False), lora(8))
    keep = torch.arange(E) % 2 == 0
    store.reside([keep])
    assert store.reads == E
    assert len(store) == 3
    for expert in (0, 2, 4):
        for name in MATRICES:
            assert torch.equal(store.get(0, expert)[name](torch.float32), fresh.get(0, expert)[name](torch.float32))
            assert store.get(0, expert)[name].nbytes == fresh.get(0, expert)[name].nbytes
    store.reside([~keep])
    assert store.reads == E + 3
    with store.streaming(2):
        assert torch.equal(store.get(0, 0)["up"](torch.float32), fresh.get(0, 0)["up"](torch.float32))
        assert len(store) == 2


def test_parameters_of_a_model_follow_their_stacks(joins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    joins(True)
    monkeypatch.setattr(layouts.StackedLayout, "num_local", property(lambda self: len(self._experts.down_proj)))
    model = MoEModel(build("olmoe"))
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    x = inputs(model.model)
    losses = [model.model(**x, use_cache=False).logits.square().mean() for _ in range(2)]
    assert torch.equal(*losses)
    losses[0].backward()
    after = model.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    experts: Any = model.layers[0].experts
    place = experts.gate_up_proj.data_ptr()
    assert not experts.gate_up_proj.is_contiguous()  # room for LoRA is beside it
    model.model(**x, use_cache=False)
    assert experts.gate_up_proj.data_ptr() == place


def test_odd_sizes_and_other_precisions_go_the_general_way() -> None:
    odd = SeparateBase(StackedWeights(draw(E, 2 * 5, H)), StackedWeights(draw(E, H, 5)))
    assert odd.joined(8, torch.float32) is None
    assert base_of(*stacks(False)).joined(8, torch.bfloat16) is None
    shared = base_of(draw(1, 2 * INNER, H).expand(E, -1, -1), draw(1, H, INNER).expand(E, -1, -1))
    assert shared.joined(8, torch.float32) is None


def test_gradients_are_not_copied_for_each_leaf(joins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    joins(True)
    trained = lora(8)
    _, grads = step(base_of(*stacks(False)), trained)
    memory = {grad.untyped_storage().data_ptr() for grad in grads[2:] if grad is not None}
    assert len(memory) == 4  # one per stack
    assert JoinedExperts is kernel.JoinedExperts
