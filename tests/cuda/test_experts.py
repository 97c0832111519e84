"""One layer of experts, large enough for grouped products, on the GPU beside float32 on the CPU; routing is given."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hfedmoe.moe.experts.activation import Gate
from hfedmoe.moe.experts.frozen import base_of
from hfedmoe.moe.experts.groups import Groups, group_pairs
from hfedmoe.moe.experts.kernel import LORA, ExpertMath, experts_forward
from hfedmoe.moe.experts.trained import TrainedExperts, full_experts
from tests.cuda.comparing import BFLOAT16, BFLOAT16_GRADIENT, FLOAT32, assert_near, is_nonzero
from tests.cuda.steps import CPU

T, K, E, H, INNER = 512, 4, 16, 256, 128


def swiglu(u: Tensor) -> Tensor:
    first, second = u.chunk(2, dim=-1)
    return torch.nn.functional.silu(first) * second


@dataclass(frozen=True)
class Case:
    """What a layer is asked to do."""

    routing: str = "even"
    """"even"; "half": only experts 0 to 7 get tokens; "one": all tokens go to expert 3; "few": 3 tokens; "none"."""
    trained: str = "lora"
    rank: int = 8
    inner: int = INNER
    keep: str = "all"
    """"all"; "some": a third of the experts is absent; "no expert" pairs are in every routing."""
    shared: bool = False
    transposed: bool = False
    silu: bool = True
    norms: bool = False

    def __str__(self) -> str:
        changed = [f"{name}={value}" for name, value in vars(self).items() if value != getattr(Case, name)]
        return ",".join(changed) or "plain"


CASES = (
    Case(),
    Case(rank=16),
    Case(rank=16, inner=96),
    Case(rank=3, inner=100),  # rows that no grouped kernel takes: 6 and 200 bytes
    Case(routing="half", norms=True),
    Case(routing="one"),
    Case(routing="few"),
    Case(routing="none"),
    Case(keep="some"),
    Case(keep="some", trained="full"),
    Case(trained="full"),
    Case(trained="full", routing="half", transposed=True),
    Case(trained="frozen", norms=True),
    Case(shared=True, rank=16),
    Case(transposed=True, norms=True),
    Case(silu=False),
)


def index_of(case: Case, draws: torch.Generator) -> Tensor:
    """int64 [T, K]: different experts for every token; the first tokens lack one, as with absent experts."""
    choices = torch.rand(T, 8 if case.routing == "half" else E, generator=draws)
    index = choices.topk(K, dim=1).indices
    index[:5, 0] = E
    if case.routing == "one":
        index = torch.full((T, K), E)
        index[:, 0] = 3
    elif case.routing in ("few", "none"):
        index[3 if case.routing == "few" else 0 :] = E
    return index


def computed(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Output and gradients of one layer with frozen weights and inputs that are multiples of bfloat16."""
    draws = torch.Generator().manual_seed(11)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=draws) * scale).bfloat16().to(device, dtype)

    index = index_of(case, draws).to(device)
    up, down = draw(E, 2 * case.inner, H, scale=H**-0.5), draw(E, H, case.inner, scale=case.inner**-0.5)
    if case.shared:
        up, down = (stack[:1].expand_as(stack) for stack in (up, down))
    if case.transposed:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    shapes = {
        "up_a": (E, case.rank, H),
        "up_b": (E, case.rank, 2 * case.inner),
        "down_a": (E, case.rank, case.inner),
        "down_b": (E, case.rank, H),
    }
    pairs = {name: draw(*shape, scale=0.1).float() for name, shape in shapes.items()}
    pairs = {name: pair.transpose(1, 2) if name.endswith("_b") else pair for name, pair in pairs.items()}
    trained = {
        "lora": lambda: TrainedExperts({name: pairs[name] for name in LORA}, 2.0),
        "full": lambda: full_experts({"up": up, "down": down}),
        "frozen": lambda: TrainedExperts({}),
    }[case.trained]()
    x, weights = draw(T, H).requires_grad_(), torch.rand(T, K, generator=draws).to(device).requires_grad_()
    mix = draw(T, H)
    keep = None if case.keep == "all" else (torch.arange(E) % 3 != 1).to(device)
    groups = group_pairs(index.reshape(-1), E, K, keep)
    check_groups(groups, index, keep)
    math = ExpertMath(base_of(up, down, case.transposed), Gate(swiglu, case.silu), 2.0, transposed=case.transposed)
    norms = torch.zeros(T * K, device=device) if case.norms else None
    leaves = trained.of([expert for expert, _, _ in groups.spans]) if trained.stacks else []
    out = experts_forward(math, x, weights.reshape(-1), groups, trained.stacks, leaves, norms)
    (out * mix).sum().backward()
    found: dict[str, Tensor | None] = {"out": out, "norms": norms, "grad x": x.grad, "grad weights": weights.grad}
    for name, own in trained.leaves.items():
        found |= {f"grad {name}.{expert}": leaf.grad for expert, leaf in enumerate(own)}
    return found


def check_groups(groups: Groups, index: Tensor, keep: Tensor | None) -> None:
    """Every pair of a present expert is in the group of its expert, once."""
    flat = index.reshape(-1)
    wanted = (flat < E) if keep is None else (flat < E) & keep[flat.clamp(max=E - 1)]
    assert groups.size == int(wanted.sum())
    for expert, start, end in groups.spans:
        assert bool((flat[groups.pair[start:end]] == expert).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    reference, found = computed(case, CPU, torch.float32), computed(case, device, dtype)
    if case.routing != "none":
        assert is_nonzero([reference["out"], reference["grad x"]])
        assert is_nonzero([reference["grad weights"]])
    if dtype == torch.float32:
        assert_near(found, reference, FLOAT32)
    else:
        assert_near(found, reference, BFLOAT16, BFLOAT16_GRADIENT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", [Case(), Case(rank=16, keep="some"), Case(trained="full"), Case(norms=True)], ids=str)
def test_the_same_bits_each_time(case: Case, dtype: torch.dtype, device: torch.device, same_bits: None) -> None:
    one, other = computed(case, device, dtype), computed(case, device, dtype)
    for name, tensor in one.items():
        again = other[name]
        assert (tensor is None) == (again is None)
        if tensor is not None and again is not None:
            assert torch.equal(tensor, again), name


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("trained", ["lora", "full"])
def test_adamw_in_one_kernel_moves_the_leaves(trained: str, rank: int, device: torch.device) -> None:
    """As clients train: the fused optimizer wants gradients laid out as their leaves are, and a B is a transpose."""
    results = []
    for where in (device, CPU):
        draws = torch.Generator().manual_seed(2)
        shapes = {"up_a": (4, rank, 24), "up_b": (4, rank, 32), "down_a": (4, rank, 16), "down_b": (4, rank, 24)}
        drawn = {name: (torch.randn(shape, generator=draws) * 0.3).to(where) for name, shape in shapes.items()}
        up, down = (torch.randn(4, *shape, generator=draws).to(where) for shape in ((32, 24), (24, 16)))
        pairs = {name: pair.transpose(1, 2) if name.endswith("_b") else pair for name, pair in drawn.items()}
        own = full_experts({"up": up, "down": down}) if trained == "full" else TrainedExperts(pairs)
        optimizer = torch.optim.AdamW(own.parameters(), lr=0.01, fused=True)
        x = torch.randn(12, 24, generator=draws).to(where)
        index = (torch.arange(24) % 3).to(where)  # expert 3 has no tokens
        groups = group_pairs(index, 4, 2)
        before = {name: stack.detach().clone() for name, stack in own.stacks.items()}
        for _ in range(2):
            math = ExpertMath(base_of(up, down), Gate(swiglu, silu=True))
            leaves = own.of([expert for expert, _, _ in groups.spans])
            weights = torch.ones(24, device=where)
            experts_forward(math, x, weights, groups, own.stacks, leaves).square().sum().backward()
            torch.nn.utils.clip_grad_norm_(own.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for name, stack in own.stacks.items():
            assert torch.equal(stack[3], before[name][3])
            assert not torch.equal(stack[:3], before[name][:3])
        results.append({f"{trained} {name}": stack for name, stack in own.stacks.items()})
    assert_near(
        results[0], results[1], 1e-3
    )  # AdamW divides by the gradient's size, so a small gradient counts as much as a large
