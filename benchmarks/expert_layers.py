"""One expert layer, forward and backward, compared with its limit: the bare matrix products that it needs.

The limit runs the same products on the same shapes, one call per expert with rows, into memory that already exists:
the base matrices forward and for the gradients of their inputs, and with LoRA the thin products with A and B and those
for their gradients. Nothing is gathered, gated, weighted or added up. Layer and limit alternate in one process; each
figure is the smallest of several. With 16-bit weights, the layer computes as the model would on this machine. The limit
uses the precision with the faster products, chosen separately for the base matrices and for LoRA.
"""

import time
from collections.abc import Callable
from typing import Any

from benchmarks.expert_step import HIDDEN, INTERMEDIATE, RANK


def measure(experts: int, top_k: int, tokens: int, dtype: str, seconds: float) -> dict[str, float]:
    """Seconds of our layer with LoRA and with frozen experts, and of the bare products of the base and of LoRA."""
    import torch

    from hfedmoe.device.allocator import keep_freed_memory
    from hfedmoe.moe.compact import wants_float32
    from hfedmoe.moe.experts.activation import Gate
    from hfedmoe.moe.experts.frozen import base_of
    from hfedmoe.moe.experts.groups import group_pairs
    from hfedmoe.moe.experts.kernel import ExpertMath, experts_forward
    from hfedmoe.moe.experts.trained import lora_experts

    keep_freed_memory()
    torch.manual_seed(0)
    stored = getattr(torch, dtype)
    computed = torch.float32 if wants_float32("auto", torch.device("cpu"), stored) else stored
    up = (torch.randn(experts, 2 * INTERMEDIATE, HIDDEN) * 0.02).to(stored)
    down = (torch.randn(experts, HIDDEN, INTERMEDIATE) * 0.02).to(stored)
    trained = lora_experts(
        experts, (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE), RANK, 16.0, 0, torch.device("cpu")
    )
    math = ExpertMath(base_of(up, down), gate=Gate(torch.nn.functional.silu, silu=True), scale=trained.scale)
    x = torch.randn(tokens, HIDDEN, dtype=computed, requires_grad=True)
    chosen = torch.randn(tokens, experts).softmax(-1).topk(top_k, dim=-1)
    weights, index = chosen.values.requires_grad_(), chosen.indices.reshape(-1)
    grad = torch.randn(tokens, HIDDEN, dtype=computed)

    def layer(stacks: dict[str, Any]) -> None:
        groups = group_pairs(index, experts, top_k)
        leaves = trained.of([expert for expert, _, _ in groups.spans]) if stacks else []
        experts_forward(math, x, weights.reshape(-1), groups, stacks, leaves).backward(grad)
        for tensor in (x, weights, *leaves):
            tensor.grad = None

    groups = group_pairs(index, experts, top_k)
    timed = {"layer": lambda: layer(trained.stacks), "frozen": lambda: layer({})}
    for precision in {stored, torch.float32}:
        timed[f"base {precision}"] = _base_products(up.to(precision), down.to(precision), groups)
        stacks = {name: stack.to(precision) for name, stack in trained.stacks.items()}
        timed[f"thin {precision}"] = _thin_products(stacks, groups)
    best = _in_turn(timed, seconds)
    base, thin = (min(best[name] for name in best if name.startswith(kind)) for kind in ("base", "thin"))
    return {"layer": best["layer"], "frozen": best["frozen"], "base_products": base, "thin_products": thin}


def _in_turn(timed: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    for work in timed.values():
        work()
    best = dict.fromkeys(timed, float("inf"))
    started, rounds = time.perf_counter(), 0
    while rounds < 3 or (time.perf_counter() - started < seconds and rounds < 50):
        for name, work in timed.items():
            begin = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - begin)
        rounds += 1
    return best


def _base_products(up: Any, down: Any, groups: Any) -> Callable[[], None]:
    import torch

    size = groups.size
    rows, wide = torch.randn(size, HIDDEN, dtype=up.dtype), torch.randn(size, 2 * INTERMEDIATE, dtype=up.dtype)
    narrow, out = torch.randn(size, INTERMEDIATE, dtype=up.dtype), torch.randn(size, HIDDEN, dtype=up.dtype)

    def work() -> None:
        for expert, start, end in groups.spans:
            torch.mm(rows[start:end], up[expert].t(), out=wide[start:end])
            torch.mm(narrow[start:end], down[expert].t(), out=out[start:end])
        for expert, start, end in groups.spans:
            torch.mm(out[start:end], down[expert], out=narrow[start:end])
            torch.mm(wide[start:end], up[expert], out=rows[start:end])

    return work


def _thin_products(stacks: dict[str, Any], groups: Any) -> Callable[[], None]:
    import torch

    size, dtype = groups.size, stacks["up_a"].dtype
    widths = {"up": (HIDDEN, 2 * INTERMEDIATE), "down": (INTERMEDIATE, HIDDEN)}
    sides = [
        (side, torch.randn(size, into, dtype=dtype), torch.randn(size, out, dtype=dtype))
        for side, (into, out) in widths.items()
    ]
    low = torch.randn(size, RANK, dtype=dtype)
    grads = {name: torch.empty_like(stack) for name, stack in stacks.items()}

    def work() -> None:
        for side, left, right in sides:
            a, b, d_a, d_b = stacks[f"{side}_a"], stacks[f"{side}_b"], grads[f"{side}_a"], grads[f"{side}_b"]
            for expert, start, end in groups.spans:
                own, inner, outer = low[start:end], left[start:end], right[start:end]
                torch.mm(inner, a[expert].t(), out=own)
                outer.addmm_(own, b[expert].t())
                torch.mm(outer, b[expert], out=own)
                inner.addmm_(own, a[expert])
                torch.mm(own.t(), inner, out=d_a[expert])
                torch.mm(own.t(), outer, out=d_b[expert].t())

    return work
