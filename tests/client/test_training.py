"""The local loop: what it counts, what reaches it of the settings, and what it refuses."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hfedmoe.client import scoring, statistics, training
from hfedmoe.client.batches import endless_batches, tokens_of
from hfedmoe.client.history import ClientHistory
from hfedmoe.client.learner import Learner
from hfedmoe.client.scoring import bootstrap
from hfedmoe.client.statistics import RoundStatistics
from hfedmoe.config import RunConfig
from hfedmoe.data.encoding import Batch, Encoder
from hfedmoe.data.example import Example
from hfedmoe.errors import TrainingError
from hfedmoe.method.scores import Evidence
from hfedmoe.models.tiny import tiny_model, tiny_tokenizer
from hfedmoe.moe.model import MoEModel

ROWS = [Example(f"{'word ' * (number + 1)}", completion="end") for number in range(5)]


def tiny() -> MoEModel:
    return MoEModel(tiny_model(len(tiny_tokenizer()), 0))


def learner(model: MoEModel, number: int = 0, batch_size: int = 2, **sections: Any) -> Learner:
    config = RunConfig.model_validate({"train": {"steps": 2, "batch_size": batch_size}} | sections)
    return Learner(model, ROWS, Encoder(tiny_tokenizer(), "{text}", max_tokens=16), config, number)


def train(model: MoEModel, method: dict[str, Any] | None = None, **settings: Any) -> training.LocalUpdate:
    sections = {"method": method or {}, "train": {"steps": 2, "batch_size": 2} | settings}
    return training.train(learner(model, **sections), ClientHistory.new(model.num_experts))


def test_statistics_weigh_samples_and_remember_every_trained_expert() -> None:
    flags = iter([[[True, False, False]], [[False, True, False]]])
    model: Any = SimpleNamespace(
        num_experts=[3],
        device="cpu",
        trained_now=lambda: next(flags),
        states=[SimpleNamespace(present=torch.arange(3))],
    )
    seen_of = RoundStatistics(model)
    for g in (torch.tensor([[1.0, 0, 0]] * 3), torch.tensor([[0.0, 1, 0]])):
        seen: Any = SimpleNamespace(evidence=Evidence(g, g.sum(0)), layer=SimpleNamespace(index=0), tokens=g.sum(0))
        seen_of.add(seen, lam=0.25)
        seen_of.note_trained(model)
    torch.testing.assert_close(seen_of.usage()[0], torch.tensor([0.75, 0.25, 0.0]))
    assert seen_of.trained(model)[0].tolist() == [True, True, False]
    assert seen_of.tokens()[0].tolist() == [3, 1, 0]


def test_decoder_tokens_that_count_are_those_with_a_target() -> None:
    batch = Batch(
        torch.zeros(2, 3),
        torch.ones(2, 3),
        torch.tensor([[5, 6], [7, -100]]),
        torch.tensor([0, 0]),
        decoder_input_ids=torch.zeros(2, 2),
    )
    assert tokens_of(batch).mask.tolist() == [[1, 1], [1, 0]]


def test_the_constants_of_the_method_reach_scores_and_importance(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[str, float, float | None]] = set()
    score, importance = scoring.score, statistics.importance

    def spy_score(name: str, evidence: Evidence, lam: float, beta: float, *rest: Any) -> Tensor:
        seen.add((name, lam, beta))
        return score(name, evidence, lam, beta, *rest)

    def spy_importance(g: Tensor, lam: float) -> Tensor:
        seen.add(("s", lam, None))
        return importance(g, lam)

    monkeypatch.setattr(scoring, "score", spy_score)
    monkeypatch.setattr(statistics, "importance", spy_importance)
    train(tiny(), {"lam": 0.3, "beta": 0.7})
    assert seen == {("ib", 0.3, 0.7), ("s", 0.3, None)}


@pytest.mark.parametrize("norm", [0.25, None])
def test_gradients_are_clipped_to_the_norm_that_is_set(norm: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    honest = torch.nn.utils.clip_grad_norm_

    def spy(parameters: Any, limit: float) -> Tensor:
        seen.append(limit)
        return honest(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    train(tiny(), max_grad_norm=norm)
    assert seen == ([] if norm is None else [norm] * 2)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = tiny()
    model.model.lm_head.weight.data[0] = math.nan
    with pytest.raises(TrainingError, match=r"the loss is nan in step 1; lower train.lr"):
        train(model)


def test_a_router_without_gradient_is_noticed() -> None:
    model = tiny()
    next(iter(model.routers.values())).requires_grad_(False)
    with pytest.raises(TrainingError, match="received no gradient: the routers do not learn"):
        train(model)


def test_a_score_of_the_backward_pass_begins_with_a_prior() -> None:
    model = tiny()
    history = ClientHistory.new(model.num_experts)
    bootstrap(learner(model, method={"score": "taylor"}), history)
    assert history.prior is not None
    assert not history.observed


MODEL = tiny()


def test_every_epoch_has_every_row_once_in_an_order_of_its_own() -> None:
    def epochs(client: int) -> list[list[str]]:
        history = ClientHistory.new([2])
        batches = endless_batches(learner(MODEL, client, batch_size=5), history)
        return [[row.text for row in next(batches)] for _ in range(2)]

    plain = [row.text for row in ROWS]
    first, second = epochs(0)
    assert sorted(first) == sorted(second) == sorted(plain)
    assert first != second
    assert [first, second] == epochs(0) != epochs(1)
    assert plain not in (first, second)
