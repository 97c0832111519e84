"""Grouped products: torch's kernel and the call per group give the same, experts without rows included."""

import pytest
import torch
from torch import Tensor

from hfedmoe.moe.experts import matmul
from hfedmoe.moe.experts.groups import Groups, group_pairs

E, S, K, N = 5, 24, 8, 12


@pytest.fixture
def groups() -> Groups:
    """Rows of experts 0, 1 and 3; expert 2 and the last have none."""
    experts = torch.tensor([0] * 7 + [1] * 9 + [3] * 8)[torch.randperm(S, generator=torch.Generator().manual_seed(0))]
    return group_pairs(experts, E, 1)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(params=["kernel", "calls"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "calls":
        monkeypatch.setattr(matmul, "has_kernel", lambda groups, *operands: False)
    return str(request.param)


def test_ends_count_experts_without_rows(groups: Groups) -> None:
    assert groups.ends.tolist() == [7, 16, 16, 24, 24]
    assert groups.ends.dtype == torch.int32


@pytest.mark.parametrize("transposed", [False, True])
def test_products_equal_those_of_each_row(groups: Groups, way: str, transposed: bool) -> None:
    left = draw(S, K)
    stack = draw(E, N, K).transpose(1, 2) if transposed else draw(E, K, N)
    assert way == "calls" or matmul.has_kernel(groups, left, stack)
    expected = torch.cat([left[start:end] @ stack[expert] for expert, start, end in groups.spans])
    torch.testing.assert_close(matmul.product(left, stack, groups), expected)
    torch.testing.assert_close(matmul.write_product(draw(S, N), left, stack, groups), expected)
    rows = draw(S, N)
    matmul.add_product(rows, left, stack, groups)
    torch.testing.assert_close(rows, draw(S, N) + expected)


def test_outer_products_are_those_of_groups_with_rows(groups: Groups, way: str) -> None:
    left, right = draw(S, K), draw(S, N)
    found = matmul.outer(left, right, groups, torch.float64)
    assert len(found) == 3
    for (_, start, end), matrix in zip(groups.spans, found, strict=True):
        assert matrix.dtype == torch.float64
        torch.testing.assert_close(matrix.float(), left[start:end].t() @ right[start:end])


def test_rows_that_are_not_aligned_go_without_the_kernel(groups: Groups) -> None:
    left, stack = draw(S, 3), draw(E, 3, N)
    assert not matmul.has_kernel(groups, left, stack)
    expected = torch.cat([left[start:end] @ stack[expert] for expert, start, end in groups.spans])
    torch.testing.assert_close(matmul.product(left, stack, groups), expected)


def test_mixed_precision_goes_without_the_kernel(groups: Groups) -> None:
    left, stack = draw(S, K).bfloat16(), draw(E, K, N)
    assert not matmul.has_kernel(groups, left, stack)
    torch.testing.assert_close(matmul.product(left, stack, groups), matmul.product(left.float(), stack, groups))


def test_16_bit_products_on_a_processor_have_few_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [5, 30, 0, 17, 40]
    groups = group_pairs(torch.repeat_interleave(torch.arange(E), torch.tensor(sizes)), E, 1)
    left, stack = draw(sum(sizes), K).bfloat16(), draw(E, K, N).bfloat16()
    exact = matmul.product(left.float(), stack.float(), groups)
    numbers: list[int] = []
    multiply = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: (numbers.append(len(a)), multiply(a, b, out=out))[1])
    found = matmul.product(left, stack, groups)
    assert numbers == [16, 32, 32, 40]  # the last group has no rows behind it
    torch.testing.assert_close(found.float(), exact, atol=0.03, rtol=0.02)
    rows = draw(sum(sizes), N).bfloat16()
    expected = rows + found
    matmul.add_product(rows, left, stack, groups)
    torch.testing.assert_close(rows, expected)


@pytest.mark.parametrize("many_rows", [1, 1000])
def test_coarser_rows_keep_their_precision(groups: Groups, many_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_MANY_ROWS", many_rows)
    left, stack, rows = draw(S, K), draw(E, K, N), draw(S, N).bfloat16()
    exact = matmul.product(left, stack, groups)
    written = matmul.write_product(rows.clone(), left, stack, groups)
    torch.testing.assert_close(written.float(), exact.bfloat16().float() if many_rows == 1 else exact)
    expected = (rows.float() + exact).bfloat16()
    matmul.add_product(rows, left, stack, groups)
    assert rows.dtype == torch.bfloat16
    torch.testing.assert_close(rows, expected)
    (one, *_), (other, *_) = (
        matmul.outer(left.to(dtype), draw(S, N), groups, torch.float32) for dtype in (torch.float32, torch.bfloat16)
    )
    torch.testing.assert_close(one, other, atol=0.05, rtol=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_products_are_those_of_the_processor(dtype: torch.dtype, groups: Groups) -> None:
    experts = torch.tensor([expert for expert, start, end in groups.spans for _ in range(end - start)])
    there = group_pairs(experts.cuda(), E, 1)
    left, right, stack = draw(S, K).to(dtype), draw(S, N).to(dtype), draw(E, K, N).to(dtype)
    near = {"atol": 0.05, "rtol": 0.05} if dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-4}
    expected = matmul.product(left, stack, groups)
    torch.testing.assert_close(matmul.product(left.cuda(), stack.cuda(), there).cpu(), expected, **near)
    rows = right.clone()
    matmul.add_product(rows, left, stack, groups)
    on_gpu = right.cuda()
    matmul.add_product(on_gpu, left.cuda(), stack.cuda(), there)
    torch.testing.assert_close(on_gpu.cpu(), rows, **near)
    for one, other in zip(
        matmul.outer(left.cuda(), right.cuda(), there, dtype), matmul.outer(left, right, groups, dtype), strict=True
    ):
        torch.testing.assert_close(one.cpu(), other, **near)
