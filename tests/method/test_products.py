import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hfedmoe.method.products import ProductAverage

E, R, IN, OUT = 3, 2, 7, 9
PREVIOUS_A = torch.randn(E, R, IN, generator=torch.Generator().manual_seed(99))
PREVIOUS_B = torch.randn(E, OUT, R, generator=torch.Generator().manual_seed(98))
ALL = torch.arange(E)


def pairs(seed: int, count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(E, R, IN, generator=generator),
            torch.randn(E, OUT, R, generator=generator),
            torch.randint(1, 40, (E,), generator=generator).float(),
        )
        for _ in range(count)
    ]


def average(clients: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    products = ProductAverage(E, R)
    for a, b, weight in clients:
        products.add(a, b, ALL, weight)
    return products.result(PREVIOUS_A, PREVIOUS_B)


def dense_mean(clients: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    total = sum(weight.double()[:, None, None] * (b.double() @ a.double()) for a, b, weight in clients)
    return total / sum(weight.double() for *_, weight in clients)[:, None, None]


# With R = 2 and min(out, in) = 7, 2 or 3 clients are kept as a stack, 4 and more as a dense product.
@given(st.integers(0, 10_000), st.integers(2, 6))
@settings(max_examples=40, deadline=None)
def test_best_approximation_of_rank_r_in_any_order(seed: int, count: int):
    clients = pairs(seed, count)
    a, b = average(clients)
    u, s, vt = torch.linalg.svd(dense_mean(clients), full_matrices=False)
    best = (u[..., :R] * s[:, None, :R]) @ vt[:, :R]
    error = torch.linalg.matrix_norm(dense_mean(clients) - (b @ a).double())
    torch.testing.assert_close(error, torch.linalg.matrix_norm(dense_mean(clients) - best), atol=1e-4, rtol=1e-4)
    other_a, other_b = average(clients[::-1])
    other_error = torch.linalg.matrix_norm(dense_mean(clients) - (other_b @ other_a).double())
    torch.testing.assert_close(other_error, error, atol=1e-4, rtol=1e-4)


@given(st.integers(0, 10_000), st.integers(2, 6), st.sampled_from(["same a", "same b", "identical"]))
@settings(max_examples=40, deadline=None)
def test_exact_when_the_mean_product_has_rank_r(seed: int, count: int, shared: str):
    clients = pairs(seed, count)
    first_a, first_b, _ = clients[0]
    if shared != "same b":
        clients = [(first_a, b, w) for _, b, w in clients]
    if shared != "same a":
        clients = [(a, first_b, w) for a, _, w in clients]
    a, b = average(clients)
    torch.testing.assert_close((b @ a).double(), dense_mean(clients), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [2, 5])
def test_form_of_the_factors(count: int):
    clients = pairs(0, count)
    a, b = average(clients)
    norm = torch.linalg.matrix_norm(PREVIOUS_A)
    torch.testing.assert_close(torch.linalg.matrix_norm(a), norm)
    torch.testing.assert_close(a @ a.mT, torch.eye(R) * (norm**2 / R)[:, None, None], atol=1e-4, rtol=1e-4)
    assert (a.gather(2, a.abs().argmax(2, keepdim=True)) > 0).all()
    # scaling every product scales b only: the signs and the directions are determined
    scaled_a, scaled_b = average([(a_c, 4 * b_c, w) for a_c, b_c, w in clients])
    torch.testing.assert_close(scaled_a, a, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scaled_b, 4 * b, atol=1e-3, rtol=1e-4)
    flipped_a, flipped_b = average([(-a_c, -b_c, w) for a_c, b_c, w in clients])
    torch.testing.assert_close(flipped_a, a, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(flipped_b, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [2, 5])
def test_a_is_never_zero(count: int):
    zero_products = [(a, torch.zeros_like(b), w) for a, b, w in pairs(0, count)]
    a, b = average(zero_products)
    torch.testing.assert_close(torch.linalg.matrix_norm(a), torch.linalg.matrix_norm(PREVIOUS_A))
    assert torch.equal(b, torch.zeros_like(b))
    products = ProductAverage(E, R)
    for client in pairs(0, count):
        products.add(client[0], client[1], ALL, client[2])
    a, b = products.result(torch.zeros_like(PREVIOUS_A), PREVIOUS_B)  # no previous norm to keep
    torch.testing.assert_close(a.norm(dim=2), torch.ones(E, R))


def test_untouched_experts_and_single_contributors():
    (a, b, weight), (other_a, other_b, _) = pairs(3, 2)
    products = ProductAverage(E, R)
    assert all(map(torch.equal, products.result(PREVIOUS_A, PREVIOUS_B), (PREVIOUS_A, PREVIOUS_B)))
    products.add(a[:2], b[:2], torch.tensor([2, 0]), weight[:2])
    products.add(other_a[:2], other_b[:2], torch.tensor([0, 1]), torch.tensor([5.0, 0.0]))
    new_a, new_b = products.result(PREVIOUS_A.bfloat16(), PREVIOUS_B)
    assert (new_a.dtype, new_b.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(new_a[1], PREVIOUS_A[1].bfloat16())  # its only weight was 0
    assert torch.equal(new_b[1], PREVIOUS_B[1])
    assert torch.equal(new_b[2], b[0])  # one contributor, weight does not matter
    assert torch.equal(new_a[2], a[0].bfloat16())
    assert not torch.equal(new_b[0], b[1])


def test_permuting_experts_permutes_the_result():
    order = torch.tensor([2, 0, 1])
    clients = pairs(5, 3)
    products = ProductAverage(E, R)
    for a, b, weight in clients:
        products.add(a[order], b[order], ALL, weight[order])
    new_a, new_b = products.result(PREVIOUS_A[order], PREVIOUS_B[order])
    a, b = average(clients)
    assert torch.equal(new_a, a[order])
    assert torch.equal(new_b, b[order])


def test_rank_larger_than_the_product():
    a, b = torch.randn(2, 1, 5, 3).unbind(0), torch.randn(2, 1, 4, 5).unbind(0)
    products = ProductAverage(1, 5)
    for factor_a, factor_b in zip(a, b, strict=True):
        products.add(factor_a, factor_b, torch.tensor([0]), torch.ones(1))
    new_a, new_b = products.result(torch.ones(1, 5, 3), torch.ones(1, 4, 5))
    torch.testing.assert_close(new_b @ new_a, (b[0] @ a[0] + b[1] @ a[1]) / 2)


def test_the_client_is_not_kept_alive_or_changed():
    a, b, weight = pairs(1, 1)[0]
    products = ProductAverage(E, R)
    products.add(a, b, ALL, weight)
    kept_a, kept_b = a.clone(), b.clone()
    a.zero_()
    b.zero_()
    new_a, new_b = products.result(PREVIOUS_A, PREVIOUS_B)
    assert torch.equal(new_a, kept_a)
    assert torch.equal(new_b, kept_b)


def test_errors():
    a, b, weight = pairs(1, 1)[0]
    products = ProductAverage(E, R)
    products.add(a, b, ALL, weight)
    with pytest.raises(ValueError, match=r"expected a \[n, r, in\] and b \[n, out, r\] of a rank up to 2"):
        products.add(a[:, :1], b, ALL, weight)
    with pytest.raises(ValueError, match="negative or not finite"):
        products.add(a, b, ALL, -weight)
    with pytest.raises(ValueError, match="differ from the earlier"):
        products.add(a[..., :3], b, ALL, weight)
    with pytest.raises(ValueError, match="a factor to average is not finite"):
        products.add(a, b / 0, ALL, weight)
    with pytest.raises(ValueError, match="do not fit"):
        products.result(PREVIOUS_A[:2], PREVIOUS_B)
    new_a, _ = products.result(PREVIOUS_A, PREVIOUS_B)
    assert torch.equal(new_a, a)  # nothing bad was folded in
