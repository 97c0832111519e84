"""Expert scores from a client's batches, and the choice of the experts that a batch trains."""

import time

import torch
from torch import Tensor

from hfedmoe.client.batches import first_batches, tokens_of
from hfedmoe.client.history import ClientHistory
from hfedmoe.client.learner import Learner
from hfedmoe.device.pace import Clock
from hfedmoe.method.scores import SCORES, Score, score
from hfedmoe.seeds import generator

PRIOR = "ib"
"""The score of a first pass if the method's own score needs a backward pass."""


def ranked_by(learner: Learner) -> Score | None:
    """The score that the method ranks experts by; None: it does not rank them."""
    name = learner.method.score(learner.settings)
    return None if name is None else SCORES[name]


def remember_scores(learner: Learner, history: ClientHistory, name: str | None) -> None:
    """Add the watched batch's scores to the history. All layers are copied to the host at once."""
    if name is None or SCORES[name].drawn:
        return
    settings, scores = learner.settings, {}
    for routing in learner.model.routing:
        assert routing.evidence is not None
        if len(routing.evidence.g) > 0:
            scores[routing.layer.index] = score(name, routing.evidence, settings.lam, settings.beta)
    if scores:
        parts = torch.cat(list(scores.values())).cpu().split([len(values) for values in scores.values()])
        for layer, values in zip(scores, parts, strict=True):
            history.scores[layer].update(values)


class Choice:
    """Lets every layer choose, during the forward pass, which of its experts a batch trains (eq. 15)."""

    def __init__(self, learner: Learner, history: ClientHistory) -> None:
        self._learner, self._history = learner, history
        self._draws = generator(learner.seed, "activation", learner.number, history.rounds)
        ties = generator(learner.seed, "ties", learner.number, history.rounds)
        # On the device from now on: a copy during the forward pass would make the host wait in every layer.
        device = learner.model.device
        self._ties = [torch.randperm(number, generator=ties).to(device) for number in learner.model.num_experts]

    def within(self, budget: list[int] | None) -> None:
        """Set how many experts per layer the next batches train; None: all resident ones."""
        limited = budget is not None and self._learner.method.train is not None
        for routing in self._learner.model.routing:
            routing.token_level = self._learner.settings.level == "token"
            routing.choose = self._chosen if limited else None
        self._budget = budget

    def _chosen(self, layer: int, evidence: object, hit: Tensor) -> Tensor:
        learner, settings, train = self._learner, self._learner.settings, self._learner.method.train
        routing, name = learner.model.routing[layer], learner.method.score(learner.settings)
        assert routing.evidence is not None
        assert train is not None
        assert self._budget is not None
        if name is not None and SCORES[name].within_pass:
            contribution = score(name, routing.evidence, settings.lam, settings.beta, self._draws)
        else:
            # Decision: a score that is known only at the end of the pass uses its values from earlier batches.
            contribution = self._history.contribution()[layer].to(hit.device, non_blocking=True)
        return train(contribution, hit, routing.resident(), self._budget[layer], self._ties[layer])


@torch.no_grad()
def bootstrap(
    learner: Learner,
    history: ClientHistory,
    most: int | None = None,
    seconds: float | None = None,
    clock: Clock = time.perf_counter,
) -> None:
    """Fill a client's history with first scores: a forward pass over some of its rows with every expert.

    Scores that need a backward pass start with the information-bottleneck contribution as a prior.

    Args:
        most: batches at most; None: as many as the method asks for.
        seconds: after which no further batch begins, but at least one is done; None: no limit.
        clock: measures them.
    """
    model, row = learner.model, ranked_by(learner)
    if row is None:
        return
    name = PRIOR if row.needs_backward else learner.method.score(learner.settings)
    assert name is not None
    scratch = ClientHistory.new(model.num_experts) if row.needs_backward else history
    Choice(learner, scratch).within(None)
    model.model.eval()
    try:
        began = clock()
        for number, rows in enumerate(first_batches(learner, most)):
            if seconds is not None and number and clock() - began >= seconds:
                break
            batch = learner.encoder.training_batch(rows).to(model.device)
            model.watch(tokens_of(batch), SCORES[name].needs)
            model.model(**batch.model_inputs())
            remember_scores(learner, scratch, name)
    finally:
        model.watch(None)
    if row.needs_backward:
        history.prior = scratch.contribution()
