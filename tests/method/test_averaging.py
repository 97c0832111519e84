import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hfedmoe.method.averaging import MeanAverage, RowAverage, StacksAverage

NAN = float("nan")
seeds = st.integers(0, 10_000)


def random_clients(seed: int, count: int = 4, experts: int = 5) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(rows [n, 2, 3], index [n], weight [n]) of clients that sent some of the experts 0..E-2, some with weight 0."""
    generator = torch.Generator().manual_seed(seed)
    clients = []
    for _ in range(count):
        index = torch.randperm(experts - 1, generator=generator)[: int(torch.randint(experts, (), generator=generator))]
        weight = torch.randint(0, 50, (len(index),), generator=generator).float()
        clients.append((torch.randn(len(index), 2, 3, generator=generator), index, weight))
    return clients


def average(clients: list[tuple[Tensor, Tensor, Tensor]], previous: Tensor) -> Tensor:
    rows = RowAverage(len(previous))
    for client in clients:
        rows.add(*client)
    return rows.result(previous)


def test_hand_worked():
    rows = RowAverage(3)
    rows.add(torch.tensor([[1.0, 2.0], [5.0, 5.0]]), torch.tensor([2, 0]), torch.tensor([1.0, 10.0]))
    rows.add(torch.tensor([[5.0, 6.0]]), torch.tensor([2]), torch.tensor([3.0]))
    # row 2: (1 * 1 + 3 * 5) / 4 = 4 and (1 * 2 + 3 * 6) / 4 = 5; row 1: nobody
    result = rows.result(torch.full((3, 2), -1.0))
    torch.testing.assert_close(result, torch.tensor([[5.0, 5.0], [-1.0, -1.0], [4.0, 5.0]]))


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_equals_the_dense_weighted_mean_in_any_order(seed: int):
    clients = random_clients(seed)
    previous = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(seed + 1))
    total, weight = torch.zeros(5, 2, 3, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for rows, index, w in clients:
        total[index] += w.double()[:, None, None] * rows.double()
        weight[index] += w.double()
    expected = torch.where(weight[:, None, None] > 0, total / weight[:, None, None], previous.double())
    result = average(clients, previous)
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(average(clients[::-1], previous), result, atol=1e-5, rtol=1e-5)
    assert torch.equal(result[weight == 0], previous[weight == 0])


@given(seeds, st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=40, deadline=None)
def test_identical_clients_average_to_themselves_exactly(seed: int, weights: list[float], dtype: torch.dtype):
    update = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
    rows, mean = RowAverage(3), MeanAverage()
    for weight in weights:
        rows.add(update, torch.arange(3), torch.full((3,), weight))
        mean.add(update, weight)
    for average in (rows, mean):
        result = average.result(torch.zeros(3, 4, dtype=dtype))
        assert result.dtype == dtype
        assert torch.equal(result, update)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_permuting_experts_permutes_the_result(seed: int):
    clients = random_clients(seed)
    previous = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(seed + 1))
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed + 2))
    place = order.argsort()  # expert e moves to place[e]
    moved = [(rows, place[index], weight) for rows, index, weight in clients]
    assert torch.equal(average(moved, previous[order]), average(clients, previous)[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_nobody_trained_are_unchanged_bit_for_bit(dtype: torch.dtype):
    previous = torch.tensor([[1.0, -0.0], [NAN, 6e-8], [3.0, 4.0]]).to(dtype)
    rows = RowAverage(3)
    assert torch.equal(rows.result(previous).view(torch.uint8), previous.view(torch.uint8))
    rows.add(torch.ones(2, 2), torch.tensor([1, 2]), torch.tensor([0.0, 1.0]))
    result = rows.result(previous)
    assert torch.equal(result[:2].view(torch.uint8), previous[:2].view(torch.uint8))
    assert torch.equal(result[2], torch.ones(2, dtype=dtype))


def test_the_client_and_the_previous_rows_are_not_touched():
    sent, previous = torch.ones(1, 2), torch.zeros(1, 2)
    rows = RowAverage(1)
    rows.add(sent, torch.zeros(1, dtype=torch.int64), torch.ones(1))
    rows.add(sent * 3, torch.zeros(1, dtype=torch.int64), torch.ones(1))
    assert torch.equal(rows.result(previous), torch.full((1, 2), 2.0))
    assert torch.equal(sent, torch.ones(1, 2))
    assert torch.equal(previous, torch.zeros(1, 2))


def test_rows_of_weight_zero_are_ignored_even_if_not_finite():
    rows = RowAverage(2)
    rows.add(torch.tensor([[NAN], [2.0]]), torch.tensor([0, 1]), torch.tensor([0.0, 1.0]))
    assert torch.equal(rows.result(torch.zeros(2, 1)), torch.tensor([[0.0], [2.0]]))


def test_a_client_without_rows_changes_nothing():
    rows = RowAverage(2)
    rows.add(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert torch.equal(rows.result(torch.ones(2, 3)), torch.ones(2, 3))


def test_mean_average_of_a_scalar():
    mean = MeanAverage()
    mean.add(torch.tensor(1.0), 1)
    mean.add(torch.tensor(4.0), torch.tensor(2.0))
    mean.add(torch.tensor(99.0), 0)
    assert mean.result(torch.tensor(0.0)).item() == pytest.approx(3.0)  # (1 + 2 * 4) / 3


@pytest.mark.parametrize(
    ("rows", "index", "weight", "message"),
    [
        (torch.ones(1, 2), [0], [-1.0], "negative or not finite"),
        (torch.ones(1, 2), [0], [NAN], "negative or not finite"),
        (torch.ones(1, 2), [0], [float("inf")], "negative or not finite"),
        (torch.ones(1, 2), [3], [1.0], "out of range"),
        (torch.ones(1, 2), [-1], [1.0], "out of range"),
        (torch.ones(2, 2), [1, 1], [1.0, 1.0], "twice"),
        (torch.ones(2, 2), [1], [1.0, 1.0], "as many indices"),
        (torch.ones(1, 3), [0], [1.0], "differ from the earlier"),
        (torch.tensor([[1.0, NAN]]), [0], [1.0], "not finite"),
    ],
)
def test_bad_arguments_leave_the_average_as_it_was(rows: Tensor, index: list[int], weight: list[float], message: str):
    average = RowAverage(3)
    average.add(torch.full((1, 2), 7.0), torch.tensor([0]), torch.ones(1))
    with pytest.raises(ValueError, match=message):
        average.add(rows, torch.tensor(index), torch.tensor(weight))
    assert torch.equal(average.result(torch.zeros(3, 2)), torch.tensor([[7.0, 7.0], [0.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="previous rows"):
        average.result(torch.zeros(3, 4))


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_stacks_of_several_layers_are_averaged_as_each_by_itself(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    stretches = {"a.up": (0, 3), "a.down": (0, 3), "b.up": (3, 5)}
    whole = StacksAverage(stretches)
    single = {name: RowAverage(number) for name, (_, number) in stretches.items()}
    for _ in range(3):
        index = (torch.rand(8, generator=generator) < 0.6).nonzero()[:, 0]
        weight = torch.randint(0, 3, (len(index),), generator=generator).float()
        stacks = {}
        for name, (first, number) in stretches.items():
            own = (index >= first) & (index < first + number)
            stacks[name] = torch.randn(int(own.sum()), 2, generator=generator)
            single[name].add(stacks[name], index[own] - first, weight[own])
        whole.add(stacks, index, weight, checked=bool(seed % 2))
    previous = {name: torch.randn(number, 2, generator=generator) for name, (_, number) in stretches.items()}
    for name, average in whole.result(previous).items():
        assert torch.equal(average, single[name].result(previous[name]))


def test_stacks_that_do_not_fit_change_nothing() -> None:
    stacks = StacksAverage({"a": (0, 2), "b": (2, 2)})
    rows = torch.ones(1, 3)
    with pytest.raises(ValueError, match="b has 0 rows, but 1 were expected"):
        stacks.add({"a": rows, "b": rows[:0]}, torch.tensor([1, 2]), torch.ones(2))
    with pytest.raises(ValueError, match="must ascend"):
        stacks.add({"a": rows, "b": rows}, torch.tensor([2, 1]), torch.ones(2))
    with pytest.raises(ValueError, match="differ from the expected"):
        stacks.add({"a": rows}, torch.tensor([1]), torch.ones(1))
    previous = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}
    assert not any(average.any() for average in stacks.result(previous).values())


def test_a_mean_refuses_what_would_spoil_it_and_stays_as_it_was() -> None:
    mean = MeanAverage()
    mean.add(torch.ones(2), 1)
    for tensor, weight, what in (
        (torch.ones(2), -1.0, "negative"),
        (torch.ones(2), NAN, "not finite"),
        (torch.ones(1), 1.0, "differs"),
        (torch.tensor([1.0, -torch.inf]), 1.0, "not finite"),
        (torch.tensor([NAN, 1.0]), 1.0, "not finite"),
    ):
        with pytest.raises(ValueError, match=what):
            mean.add(tensor, weight)
    assert torch.equal(mean.result(torch.zeros(2)), torch.ones(2))


def test_16_bit_tensors_are_averaged_in_float32() -> None:
    mean, neighbour = MeanAverage(), 1.0078125  # of 1 in bfloat16
    for value in [1.0] + [neighbour] * 7:
        mean.add(torch.tensor([value]).bfloat16(), 1)
    assert mean.result(torch.zeros(1)).item() == pytest.approx(1 + 7 / 8 * (neighbour - 1), abs=1e-6)
