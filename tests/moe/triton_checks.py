"""What `test_triton_rows` runs in a process of its own: `python -m tests.moe.triton_checks rows|quantised|compiled`."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hfedmoe.moe.experts import rows, triton_rows
from hfedmoe.moe.experts.bank import QuantisedBank, Scratch
from hfedmoe.moe.experts.groups import Groups
from hfedmoe.moe.experts.quantised import Quantised4, Quantised8

T, K, D, INNER, S, ROOM = 7, 3, 40, 24, 18, 8
UNTOUCHED = 7.0


def both(work: Callable[[], list[Tensor]]) -> None:
    """Compare what torch computes and what the kernels do."""
    expected, original = work(), rows._of_device
    rows._of_device = lambda kind: triton_rows  # type: ignore[assignment]
    found = work()
    rows._of_device = original
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def check_rows() -> None:
    torch.manual_seed(0)
    x, token, places = torch.randn(T, D), torch.randint(0, T, (S,)), torch.randperm(T * K).view(T, K)
    u, w, d_a, pairs = torch.randn(S, 2 * INNER), torch.rand(S), torch.randn(S, INNER), torch.randn(S, D)

    def gathered() -> list[Tensor]:
        out = torch.full((S, D + ROOM), UNTOUCHED)
        rows.gather(x, token, out[:, :D])
        return [out]

    def gated() -> list[Tensor]:
        out = torch.full((S, INNER + ROOM), UNTOUCHED)
        rows.silu_gate(u, w, out[:, :INNER])
        return [out]

    def backward() -> list[Tensor]:
        a, d_u = torch.empty(S, INNER), torch.full((S, 2 * INNER + ROOM), UNTOUCHED)
        return [rows.silu_gate_backward(u, w, d_a.clone(), a, d_u[:, : 2 * INNER]), a, d_u]

    both(gathered)
    both(gated)
    both(backward)
    groups = Groups(T, token, token, [(0, 0, S)], 1, torch.tensor([S]), places)  # three of 21 pairs are left out
    both(lambda: [rows.sum_pairs(pairs, groups)])
    leaf, weight = u.clone().requires_grad_(), w.clone().requires_grad_()
    gate, up = leaf.chunk(2, dim=1)
    (torch.nn.functional.silu(gate) * up * weight[:, None]).backward(d_a)
    d_w, a, d_u = backward()
    torch.testing.assert_close(d_w, weight.grad)
    torch.testing.assert_close(d_u[:, : 2 * INNER], leaf.grad)
    torch.testing.assert_close(a, gated()[0][:, :INNER])


def check_quantised() -> None:
    torch.manual_seed(0)
    kinds: tuple[Any, ...] = (Quantised4, Quantised8)
    for kind in kinds:
        for shape in ((24, 96), (49, 100)):
            held = [kind(torch.randn(shape) * scale) for scale in (1, 2, 3)]
            bank = QuantisedBank(held, Scratch())
            both(lambda bank=bank: [bank.dequantised(ROOM, torch.float32)[:, :-ROOM, :-ROOM].clone()])
            out = bank.dequantised(ROOM, torch.float32)[:, :-ROOM, :-ROOM]
            assert torch.equal(out, torch.stack([one(torch.float32) for one in held]))


def check_compiled() -> None:
    """For a Hopper GPU, which need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {"u8": "data", "i64": "token places", "fp32": "d_w nested mean code scale_code"}
    kinds = {name: f"*{kind}" for kind, names in pointers.items() for name in names.split()}
    kinds |= dict.fromkeys(("x", "out", "rows", "u", "w", "d_a", "a", "d_u"), "*bf16")
    constants = {"columns": 2048, "block": 1024, "top_k": 8, "width": 2048, "per_scale": 64, "per_nested": 256}
    kernels = [one for one in vars(triton_rows).values() if isinstance(one, triton.runtime.JITFunction)]
    assert len(kernels) == 6
    for kernel in kernels:
        names = list(inspect.signature(kernel.fn).parameters)
        scales = {"scales": "*u8" if "nested" in names else "*fp32"}
        constant = {name: constants[name] for name in names if name in constants}
        signature = {name: "constexpr" if name in constant else (kinds | scales).get(name, "i32") for name in names}
        compiled = triton.compile(ASTSource(kernel, signature, constant), target=GPUTarget("cuda", 90, 32))
        assert len(compiled.asm["cubin"]) > 0


if __name__ == "__main__":
    {"rows": check_rows, "quantised": check_quantised, "compiled": check_compiled}[sys.argv[1]]()
    print("checked")
