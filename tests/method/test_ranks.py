"""LoRA pairs of several ranks, on numbers worked out by hand."""

import pytest
import torch
from torch import Tensor

from hfedmoe.method.products import ProductAverage
from hfedmoe.method.ranks import PaddedAverage, by_share, nearest, product_norm

ONE = torch.tensor([0])


def weight(value: float) -> Tensor:
    return torch.tensor([value])


def test_ranks_follow_the_share() -> None:
    assert [by_share(share, 8) for share in (1.0, 0.5, 0.25, 0.1, 0.01)] == [8, 4, 2, 1, 1]
    assert [by_share(share, 1) for share in (1.0, 0.25)] == [1, 1]


def test_the_norm_of_a_product_needs_no_product() -> None:
    a, b = torch.randn(3, 2, 7), torch.randn(3, 5, 2)
    torch.testing.assert_close(product_norm(a, b), torch.linalg.matrix_norm(b @ a))
    assert product_norm(a, torch.zeros_like(b)).tolist() == [0.0] * 3


def test_lower_ranks_are_padded_with_zeros_and_rows_that_nobody_sent_stay() -> None:
    average = PaddedAverage(3, 2)
    average.add(torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]), torch.tensor([[[1.0, 0.0]]]), ONE, weight(3.0))
    average.add(torch.tensor([[[0.0, 1.0]]] * 2), torch.tensor([[[1.0]]] * 2), torch.tensor([0, 2]), torch.ones(2))
    before_a, before_b = torch.full((3, 2, 2), 7.0), torch.full((3, 1, 2), 5.0)
    a, b = average.result(before_a, before_b)
    assert a[0].tolist() == [[9 / 4, 1 / 4], [0.0, 3.0]]
    assert b[0].tolist() == [[1.0, 0.0]]
    assert torch.equal(a[1], before_a[1])
    assert torch.equal(b[1], before_b[1])
    assert a[2].tolist() == [[0.0, 1.0], [7.0, 7.0]]  # only a client of rank 1 trained it
    assert b[2].tolist() == [[1.0, 5.0]]


def test_what_does_not_count_keeps_no_rows() -> None:
    average = PaddedAverage(1, 2)
    average.add(torch.ones(1, 2, 3), torch.ones(1, 4, 2), ONE, weight(0.0))
    average.add(torch.ones(1, 1, 3), torch.ones(1, 4, 1), ONE, weight(1.0))
    a, b = average.result(torch.full((1, 2, 3), 7.0), torch.full((1, 4, 2), 7.0))
    assert a[0].tolist() == [[1.0] * 3, [7.0] * 3]
    assert b[0].tolist() == [[1.0, 7.0]] * 4


@pytest.mark.parametrize(("a", "b"), [((1, 3, 2), (1, 1, 3)), ((1, 2, 2), (1, 1, 1)), ((2, 2), (1, 1, 2))])
def test_factors_of_a_wrong_rank_are_refused(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected a \[n, r, in\]"):
        PaddedAverage(1, 2).add(torch.ones(a), torch.ones(b), ONE, weight(1.0))


def test_products_of_several_ranks_are_averaged_and_lowered_to_the_nearest() -> None:
    """diag(4, 0) and diag(0, 2), of rank 1 each: their mean is diag(2, 1), and the nearest of rank 1 is diag(2, 0)."""
    products = ProductAverage(1, 2)
    products.add(torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[2.0], [0.0]]]), ONE, weight(1.0))
    products.add(torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[0.0], [2.0]]]), ONE, weight(1.0))
    before = torch.eye(2)[None]
    a, b = products.result(before, before)
    torch.testing.assert_close(b @ a, torch.diag(torch.tensor([2.0, 1.0]))[None])
    low_a, low_b = nearest(a, b, 1)
    assert low_a.shape == (1, 1, 2)
    assert low_b.shape == (1, 2, 1)
    torch.testing.assert_close(low_b @ low_a, torch.tensor([[[2.0, 0.0], [0.0, 0.0]]]))
    torch.testing.assert_close(low_a, torch.tensor([[[1.0, 0.0]]]))  # as long as a row of A was


def test_one_product_of_a_lower_rank_leaves_directions_for_larger_ranks_to_train() -> None:
    products = ProductAverage(1, 3)
    one_a, one_b = torch.randn(1, 1, 6), torch.randn(1, 5, 1)
    products.add(one_a, one_b, ONE, weight(2.0))
    before = torch.randn(1, 3, 6)
    a, b = products.result(before, torch.zeros(1, 5, 3))
    torch.testing.assert_close(b @ a, one_b @ one_a)
    norm = torch.linalg.matrix_norm(before)[0]
    torch.testing.assert_close(a[0] @ a[0].T, torch.eye(3) * norm**2 / 3, atol=1e-4, rtol=1e-4)


def test_the_nearest_of_a_new_pair_are_its_first_rows() -> None:
    a, b = torch.randn(2, 4, 6), torch.randn(2, 5, 4)
    b[0] = 0.0
    low_a, low_b = nearest(a, b, 2)
    assert torch.equal(low_a[0], a[0, :2])
    assert torch.equal(low_b[0], b[0, :, :2])
    u, s, vt = torch.linalg.svd(b[1] @ a[1])
    torch.testing.assert_close(low_b[1] @ low_a[1], (u[:, :2] * s[:2]) @ vt[:2], atol=1e-4, rtol=1e-4)


def test_a_matrix_smaller_than_the_rank() -> None:
    a, b = torch.randn(1, 5, 3), torch.randn(1, 4, 5)
    low_a, low_b = nearest(a, b, 4)
    assert low_a.shape == (1, 4, 3)
    assert low_b.shape == (1, 4, 4)
    torch.testing.assert_close(low_b @ low_a, b @ a, atol=1e-5, rtol=1e-4)
