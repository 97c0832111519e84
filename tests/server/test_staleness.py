"""Updates that come late, by numbers worked out by hand."""

import pytest
import torch
from torch import Tensor

from hfedmoe.events import Work
from hfedmoe.server.staleness import discount, on_the_model_of_now
from hfedmoe.wire.messages import Update


def test_a_change_counts_less_the_later_it_comes() -> None:
    assert [discount(s, 0.5) for s in (0, 3, 8)] == [1.0, 0.5, pytest.approx(1 / 3)]
    assert discount(5, 0.0) == 1.0
    assert discount(1, 1.0) == 0.5


def test_its_change_is_put_on_the_model_of_now_for_the_rows_that_were_sent() -> None:
    def tensors(gate: list[float], rows: list[float]) -> dict[str, Tensor]:
        return {"router.0.weight": torch.tensor(gate), "experts.0.up": torch.tensor(rows)[:, None]}

    then, now = tensors([1.0, 2.0], [10.0, 20.0, 30.0]), tensors([2.0, 2.0], [11.0, 24.0, 50.0])
    sent = [torch.tensor([True, False, True])]
    vector = [torch.zeros(3)]
    update = Update(tensors([5.0, 0.0], [14.0, 22.0]), sent, sent, vector, vector, vector, Work())
    # Its gate went from 1 to 5 and from 2 to 0; expert 0 from 10 to 14, expert 2 from 30 to 22. Half of that counts.
    found = on_the_model_of_now(update, then, now, 0.5)
    assert found["router.0.weight"].tolist() == [2.0 + 2.0, 2.0 - 1.0]
    assert found["experts.0.up"].flatten().tolist() == [11.0 + 2.0, 50.0 - 4.0]


def test_of_a_client_with_a_smaller_rank_only_its_components_change() -> None:
    names = "experts.0.up_a", "experts.0.up_b"
    then = {names[0]: torch.zeros(1, 2, 3), names[1]: torch.zeros(1, 4, 2)}
    now = {name: tensor + 1 for name, tensor in then.items()}
    sent, vector = [torch.tensor([True])], [torch.zeros(1)]
    tensors = {names[0]: torch.full((1, 1, 3), 4.0), names[1]: torch.full((1, 4, 1), 8.0)}
    found = on_the_model_of_now(Update(tensors, sent, sent, vector, vector, vector, Work()), then, now, 0.25, rank=1)
    assert found[names[0]].tolist() == torch.full((1, 1, 3), 2.0).tolist()
    assert found[names[1]].tolist() == torch.full((1, 4, 1), 3.0).tolist()
