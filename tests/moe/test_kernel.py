"""The expert forward beside plain autograd: shared bases, activation budgets, precision, checkpointing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hfedmoe.moe.experts import kernel
from hfedmoe.moe.experts.activation import Gate
from hfedmoe.moe.experts.frozen import SeparateBase, SharedBase, StackedWeights, base_of
from hfedmoe.moe.experts.groups import group_pairs
from hfedmoe.moe.experts.kernel import LORA, ExpertMath, experts_forward
from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.routing.tokens import TokenMasks
from tests.families.table import build, inputs

T, K, E, H, WIDTH, R = 12, 2, 5, 8, 6, 2


def gate(u: Tensor) -> Tensor:
    first, second = u.chunk(2, dim=-1)
    return torch.nn.functional.silu(first) * second


def problem(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    index = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    index[0, 1] = E  # a pair without an expert
    return {
        "x": draw(T, H),
        "index": index,
        "weights": draw(T, K).softmax(-1),
        "up": draw(E, 2 * WIDTH, H),
        "down": draw(E, H, WIDTH),
        "up_a": draw(E, R, H),
        "up_b": draw(E, 2 * WIDTH, R),
        "down_a": draw(E, R, WIDTH),
        "down_b": draw(E, H, R),
    }


def plain(p: dict[str, Tensor], scale: float) -> Tensor:
    """Token by token, with merged weights."""
    out = torch.zeros_like(p["x"])
    for token in range(T):
        for slot in range(K):
            e = int(p["index"][token, slot])
            if e < E:
                up = p["up"][e] + scale * p["up_b"][e] @ p["up_a"][e]
                down = p["down"][e] + scale * p["down_b"][e] @ p["down_a"][e]
                y = down @ gate((up @ p["x"][token])[None])[0]
                out = out.index_add(0, torch.tensor([token]), (p["weights"][token, slot] * y)[None])
    return out


def ours(p: dict[str, Tensor], scale: float, silu: bool, keep: Tensor | None = None) -> Tensor:
    math = ExpertMath(base_of(p["up"].detach(), p["down"].detach()), Gate(gate, silu), scale=scale)
    groups = group_pairs(p["index"].reshape(-1), E, K, keep)
    leaves = [p[name][e] for e, _, _ in groups.spans for name in LORA]
    stacks = {name: p[name].detach() for name in LORA}
    return experts_forward(math, p["x"], p["weights"].reshape(-1), groups, stacks, leaves)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_forward_and_all_gradients_equal_plain_autograd(silu: bool, shared: bool) -> None:
    p = problem()
    if shared:
        p["up"], p["down"] = (p[name][:1].expand(E, *p[name].shape[1:]) for name in ("up", "down"))
    assert isinstance(base_of(p["up"], p["down"]), SharedBase if shared else SeparateBase)
    wanted = ["x", "weights", *LORA]
    results = []
    for function in (lambda: plain(p, 1.5), lambda: ours(p, 1.5, silu)):
        for name in wanted:
            p[name] = p[name].detach().requires_grad_()
        out = function()
        results.append([out, *torch.autograd.grad((out * torch.arange(H)).sum(), [p[name] for name in wanted])])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_absent_and_dropped_pairs_give_nothing() -> None:
    p = problem()
    keep = torch.tensor([True, False, True, False, True])
    whole = ours(p, 1.0, True)
    parts = ours(p, 1.0, True, keep) + ours(p, 1.0, True, ~keep)
    torch.testing.assert_close(parts, whole)
    nothing = ours(p, 1.0, True, torch.zeros(E, dtype=torch.bool))
    assert not nothing.any()


@pytest.mark.parametrize("thin", [torch.bfloat16, torch.float32])  # as on a GPU, and as on a processor
def test_bfloat16_is_close_to_double(thin: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_thin_dtype", lambda x: thin if x.dtype == torch.bfloat16 else x.dtype)
    wanted = ["x", "weights", *LORA]
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        p = problem(dtype)
        if dtype == torch.bfloat16:
            p |= {name: p[name].float() for name in LORA}  # as they are trained
        p |= {name: p[name].requires_grad_() for name in wanted}
        out = ours(p, 1.5, True)
        results.append([out, *torch.autograd.grad(out.sum(), [p[name] for name in wanted])])
    exact, rough = results
    assert [tensor.dtype for tensor in rough] == [torch.bfloat16] * 3 + [torch.float32] * 4
    for one, other in zip(exact, rough, strict=True):
        torch.testing.assert_close(other.double(), one, atol=0.03 * one.abs().max().item(), rtol=0)


def test_pairs_of_a_token_are_added_up_in_float32() -> None:
    groups = group_pairs(torch.tensor([0, 1, 2]), 3, 3)
    rows = torch.tensor([[256.0], [1.0], [1.0]]).bfloat16()  # in bfloat16, 256 + 1 is 256
    assert groups.sum_per_token(rows).tolist() == [[258.0]]
    assert group_pairs(torch.tensor([0, 3, 2]), 3, 3).sum_per_token(rows[:2]).tolist() == [[257.0 - 1]]


def test_the_identity_as_gate_leaves_what_the_backward_pass_needs() -> None:
    p = problem()
    p["up"], p["up_b"] = p["up"][:, :WIDTH], p["up_b"][:, :WIDTH]
    groups = group_pairs(p["index"].reshape(-1), E, K)
    p |= {name: p[name].requires_grad_() for name in ("x", "weights", *LORA)}
    leaves = [p[name][e] for e, _, _ in groups.spans for name in LORA]
    for identity in (lambda u: u, lambda u: u * 1.0):
        math = ExpertMath(base_of(p["up"], p["down"]), Gate(identity))
        out = experts_forward(math, p["x"], p["weights"].reshape(-1), groups, {n: p[n].detach() for n in LORA}, leaves)
        grads = torch.autograd.grad(out.sum(), [p["x"], p["weights"]], retain_graph=True)
        if identity(p["x"]) is p["x"]:
            first = grads
    for one, other in zip(first, grads, strict=True):
        torch.testing.assert_close(one, other)


def test_second_derivatives_are_refused() -> None:
    p = problem()
    p["x"].requires_grad_()
    (grad,) = torch.autograd.grad(ours(p, 1.0, True).square().sum(), p["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_transposed_storage_gives_the_same_products() -> None:
    p = problem()
    groups = group_pairs(p["index"].reshape(-1), E, K)
    rows = p["x"].index_select(0, groups.token)
    one = SeparateBase(StackedWeights(p["up"]), StackedWeights(p["down"]))
    other = base_of(p["up"].transpose(1, 2).contiguous(), p["down"].transpose(1, 2).contiguous(), transposed=True)
    torch.testing.assert_close(one.up(p["x"], rows, groups), other.up(p["x"], rows, groups))
    torch.testing.assert_close(one.down_t(p["x"], rows, groups), other.down_t(p["x"], rows, groups))


def losses(model: MoEModel, change: Callable[[MoEModel], None]) -> tuple[Tensor, list[Tensor | None]]:
    for state in model.states:
        generator = torch.Generator().manual_seed(1)
        for stack in state.trained.stacks.values():
            stack.copy_(torch.randn(stack.shape, generator=generator) * 0.3)
    change(model)
    loss = model.model(**inputs(model.model)).logits.float().logsumexp(-1).sum()
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in model.parameters()]


def test_experts_over_the_activation_budget_run_but_do_not_train() -> None:
    def freeze_some(model: MoEModel) -> None:
        for state in model.states:
            state.trainable = torch.arange(6) < 3

    free, _ = losses(MoEModel(build("mixtral")), lambda model: None)
    frozen_model = MoEModel(build("mixtral"))
    frozen, _ = losses(frozen_model, freeze_some)
    torch.testing.assert_close(frozen, free)  # the same forward pass
    for state in frozen_model.states:
        for name in LORA:
            assert all(leaf.grad is None for leaf in state.trained.leaves[name][3:])
            assert any(leaf.grad is not None for leaf in state.trained.leaves[name][:3])
    assert all(router.grad is not None and router.grad[3:].any() for router in frozen_model.routers.values())

    def skip_some(model: MoEModel) -> None:
        freeze_some(model)

    skipped, _ = losses(MoEModel(build("mixtral"), off_budget="skip"), skip_some)
    assert (skipped - free).abs() > 1e-3


def test_gradient_checkpointing_changes_nothing() -> None:
    plain_loss, plain_grads = losses(MoEModel(build("mixtral")), lambda model: None)
    loss, grads = losses(MoEModel(build("mixtral")), MoEModel.checkpoint_activations)
    torch.testing.assert_close(loss, plain_loss)
    for got, expected in zip(grads, plain_grads, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_torch_compile_leaves_masks_and_statistics_right(family: str) -> None:
    """Two layers, as tracing one takes seconds: with experts in both, and with experts of groups in the second."""

    def step(compiled: bool) -> tuple[Tensor, list[Tensor | None], Tensor]:
        model = MoEModel(build(family, num_hidden_layers=2))
        model.set_resident([torch.arange(number) % 2 == 0 for number in model.num_experts])
        x = inputs(model.model)
        model.watch(TokenMasks(x["attention_mask"]))
        forward = torch.compile(model.model, backend="eager") if compiled else model.model
        loss = forward(**x).logits.float().logsumexp(-1).sum()
        loss.backward()
        evidence = model.routing[0].evidence
        assert evidence is not None
        return loss.detach(), [leaf.grad for leaf in model.parameters()], evidence.g

    (loss, grads, g), (expected_loss, expected, expected_g) = step(True), step(False)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(g, expected_g)
    assert any(grad is not None for grad in grads)
    for grad, other in zip(grads, expected, strict=True):
        assert (grad is None) == (other is None)
        if grad is not None and other is not None:
            torch.testing.assert_close(grad, other)


def test_autocast_computes_in_bfloat16_and_keeps_float32_leaves() -> None:
    model = MoEModel(build("mixtral"))
    x = inputs(model.model)
    exact = model.model(**x).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model.model(**x).logits
    torch.testing.assert_close(rough.float(), exact, atol=0.1 * exact.abs().max().item(), rtol=0)
    rough.float().sum().backward()
    grads = [leaf.grad for leaf in model.parameters() if leaf.grad is not None]
    assert grads
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


def test_renormalised_top_1_is_told_to_the_user() -> None:
    assert MoEModel(build("mixtral")).router_gradient_problem() is None
    problem = MoEModel(build("mixtral", num_experts_per_tok=1)).router_gradient_problem()
    assert problem is not None
    assert "no gradient" in problem
    assert MoEModel(build("mixtral", num_experts_per_tok=1), router=False).router_gradient_problem() is None
