"""Losses worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from hfedmoe.data.encoding import Batch
from hfedmoe.data.example import Example
from hfedmoe.data.losses import answer_loss, label_adjustment
from hfedmoe.errors import TrainingError

LN2 = math.log(2)


def batch(choices: bool = True) -> Batch:
    return Batch(
        torch.zeros(1, 1),
        torch.ones(1, 1),
        targets=torch.tensor([[1]]),
        answers=torch.tensor([1]),
        choice_tokens=torch.tensor([[0, 1]]) if choices else None,
    )


def cross_entropy(values: list[float]) -> Tensor:
    return torch.nn.functional.cross_entropy(torch.tensor([values]), torch.tensor([1]))


def test_logit_adjustment_is_the_centred_log_frequency() -> None:
    rows = [Example("t", ("x", "y"), answer) for answer in (0, 0, 0, 1)]  # counts + 1: 4 and 2
    torch.testing.assert_close(label_adjustment(rows, 2.0), torch.tensor([1.0, -1.0]) * LN2)
    assert label_adjustment(rows, 0.0) is None
    assert label_adjustment([*rows, Example("t", ("x", "z"), 0)], 2.0) is None


def test_the_loss_is_over_the_vocabulary_or_among_the_choices() -> None:
    logits, adjustment = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([1.0, -1.0]) * LN2
    torch.testing.assert_close(answer_loss(logits, batch()), cross_entropy([1.0, 2.0, 3.0]))
    torch.testing.assert_close(answer_loss(logits, batch(), True), cross_entropy([1.0, 2.0]))
    torch.testing.assert_close(answer_loss(logits, batch(), True, adjustment), cross_entropy([1 + LN2, 2 - LN2]))
    adjusted = answer_loss(logits, batch(), False, adjustment)
    torch.testing.assert_close(adjusted, cross_entropy([1 + LN2, 2 - LN2, 3.0]))
    with pytest.raises(TrainingError, match="differ in their first token"):
        answer_loss(logits, batch(choices=False), True)
