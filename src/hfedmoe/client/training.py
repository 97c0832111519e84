"""The local loop of one client: a few optimizer steps on its resident experts, and what they showed of its experts."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfedmoe.client.history import ClientHistory
from hfedmoe.config import MethodConfig, TrainConfig
from hfedmoe.data.encoding import IGNORED, Batch, Encoder
from hfedmoe.data.losses import answer_loss, label_adjustment
from hfedmoe.data.rows import Example
from hfedmoe.device.pace import Pace
from hfedmoe.errors import TrainingError
from hfedmoe.method.importance import importance
from hfedmoe.method.scores import NEEDS, RunningMean, score
from hfedmoe.method.selection import activation
from hfedmoe.method.usage import usage
from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.routing.layer import LayerRouting
from hfedmoe.moe.routing.tokens import TokenMasks
from hfedmoe.seeds import derive, generator


class OutOfTimeError(TrainingError):
    """Not even one step can be done anywhere near the deadline; what that showed is in the client's history."""


@dataclass
class LocalUpdate:
    """What one round of local training measured; the trained tensors are in the model."""

    usage: list[Tensor]
    """Per layer float32 [E], u of eq. 16 over the round's samples."""
    importance: list[Tensor]
    """Per layer float32 [E], s of eq. 5, the mean over the round's batches."""
    tokens: list[Tensor]
    """Per layer float32 [E], tokens that each expert processed."""
    trained: list[Tensor]
    """Per layer bool [E], experts that received at least one optimizer step."""
    losses: list[float]
    seconds: float
    steps: int
    steps_wanted: int
    activation: float | None
    """Experts per layer that a step could train, the mean over layers and steps; None: all resident ones."""


class _Statistics:
    """Accumulates over a round's batches what the routers of all layers show."""

    def __init__(self, model: MoEModel) -> None:
        numbers, device = model.num_experts, model.device
        self.usage = [RunningMean(number, device) for number in numbers]
        self.importance = [RunningMean(number, device) for number in numbers]
        self.tokens = [torch.zeros(number, device=device) for number in numbers]
        self._num_experts = numbers
        self._trained: list[list[bool]] = [[] for _ in numbers]

    def add(self, routing: LayerRouting, lam: float) -> None:
        evidence, layer = routing.evidence, routing.layer.index
        assert evidence is not None
        assert routing.tokens is not None
        if len(evidence.g) == 0:  # a batch without a single token
            return
        self.usage[layer].update(usage(evidence.g), weight=len(evidence.g))
        self.importance[layer].update(importance(evidence.g, lam))
        self.tokens[layer] += routing.tokens

    def note_trained(self, model: MoEModel) -> None:
        """After a step: remember who had a gradient, on the host, where the gradients' being there is known."""
        for layer, flags in enumerate(model.trained_now()):
            before = self._trained[layer] or [False] * len(flags)
            self._trained[layer] = [a or b for a, b in zip(before, flags, strict=True)]

    def trained(self, model: MoEModel) -> list[Tensor]:
        """Per layer bool [E]: the experts that any step trained."""
        found = []
        for state, number, flags in zip(model.states, self._num_experts, self._trained, strict=True):
            trained = torch.zeros(number, dtype=torch.bool)
            if flags:
                trained[state.present.cpu()] = torch.tensor(flags)
            found.append(trained)
        return found


def train(
    model: MoEModel,
    examples: Sequence[Example],
    encoder: Encoder,
    settings: TrainConfig,
    method: MethodConfig,
    history: ClientHistory,
    activation_budget: list[int] | None,
    seed: int,
    client: int,
    lr_factor: float = 1.0,
    on_step: Callable[[int, float], None] | None = None,
    pace: Pace | None = None,
) -> LocalUpdate:
    """Train the model's trainable tensors in place; updates the client's history.

    The same seed and history give the same bits, unless there is a pace: what its clock shows decides how many steps
    are done and how many experts they train, so a run with deadlines is repeated or resumed only approximately.

    Args:
        examples: the client's own rows.
        activation_budget: experts per layer that one batch may train; None: all resident.
        seed: of the run; the client's own draws are derived from it, its number and its round.
        lr_factor: what the round's schedule leaves of train.lr.
        on_step: called with (step, loss) after every step.
        pace: keeps a deadline; None: all steps are done, each within the activation budget.

    Raises:
        TrainingError: the loss is not finite, or nothing that should train received a gradient.
        OutOfTimeError: the pace has given the round up.
    """
    clock = time.perf_counter if pace is None else pace.clock
    started = clock()
    if pace is not None:
        pace.begin()
    torch.manual_seed(derive(seed, "train", client, history.rounds))
    parameters = model.parameters()
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.lr * lr_factor, weight_decay=settings.weight_decay, fused=True
    )
    adjustment = label_adjustment(examples, settings.logit_adjustment)
    statistics, losses = _Statistics(model), []
    draws = generator(seed, "activation", client, history.rounds)
    _choose_by_budget(model, method, history, activation_budget, draws)
    model.model.train()
    batches = _batches(examples, settings.batch_size, history, seed, client)
    try:
        for step in range(1, settings.steps + 1):
            if pace is not None:
                allowed = pace.next()
                if allowed is None:
                    break
                limited = activation_budget if allowed == pace.most else allowed
                _choose_by_budget(model, method, history, limited, draws)
            batch = encoder.training_batch(next(batches)).to(model.device)
            model.watch(_tokens(batch), NEEDS[method.score])
            loss = answer_loss(
                model.model(**batch.model_inputs()).logits, batch, settings.loss == "choices", adjustment
            )
            if pace is not None:
                _synchronise(model)
                if (taken := pace.give_up()) is not None:
                    raise OutOfTimeError(
                        f"the forward pass of its first step took {taken:.1f} s, "
                        f"and its deadline is {pace.deadline_s:g} s"
                    )
            loss.backward()
            losses.append(loss.item())  # after the backward pass has been handed to the device: this waits for it
            if not math.isfinite(losses[-1]):
                raise TrainingError(f"the loss is {losses[-1]} in step {step}; lower train.lr (now {settings.lr:g})")
            if step == 1:
                _check_gradients(model)
            if settings.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            statistics.note_trained(model)
            for routing in model.routing:
                statistics.add(routing, method.lam)
            _score(model, method, history)
            optimizer.zero_grad(set_to_none=True)
            if on_step is not None:
                on_step(step, losses[-1])
            if pace is not None:
                _synchronise(model)
                pace.done()
    finally:
        model.watch(None)
        for parameter in parameters:
            parameter.grad = None
        model.model.eval()
    history.rounds += 1
    return LocalUpdate(
        usage=[mean.value().nan_to_num(0.0).cpu() for mean in statistics.usage],
        importance=[mean.value().nan_to_num(0.0).cpu() for mean in statistics.importance],
        tokens=[tokens.cpu() for tokens in statistics.tokens],
        trained=statistics.trained(model),
        losses=losses,
        seconds=clock() - started,
        steps=len(losses),
        steps_wanted=settings.steps,
        activation=_mean_activation(activation_budget) if pace is None else pace.mean_level,
    )


@torch.no_grad()
def bootstrap(
    model: MoEModel,
    examples: Sequence[Example],
    encoder: Encoder,
    method: MethodConfig,
    batch_size: int,
    history: ClientHistory,
    seed: int,
    client: int,
) -> None:
    """First scores of a client: a forward-only pass over some of its data with every expert, into its history.

    Scores that need a backward pass begin with the information-bottleneck contribution as a prior.
    """
    forward_only = NEEDS[method.score] != "taylor"
    scoring = method if forward_only else method.model_copy(update={"score": "ib"})
    scratch = history if forward_only else ClientHistory.new(model.num_experts)
    order = torch.randperm(len(examples), generator=generator(seed, "bootstrap", client)).tolist()
    _choose_by_budget(model, scoring, scratch, None, generator(seed, "bootstrap", client))
    model.model.eval()
    try:
        for start in range(0, min(len(order), method.bootstrap_batches * batch_size), batch_size):
            rows = [examples[i] for i in order[start : start + batch_size]]
            batch = encoder.training_batch(rows).to(model.device)
            model.watch(_tokens(batch), NEEDS[scoring.score])
            model.model(**batch.model_inputs())
            _score(model, scoring, scratch)
    finally:
        model.watch(None)
    if not forward_only:
        history.prior = scratch.contribution()


def _tokens(batch: Batch) -> TokenMasks:
    if batch.decoder_input_ids is None:
        return TokenMasks(batch.attention_mask)
    return TokenMasks((batch.targets != IGNORED).long(), batch.attention_mask)


def _score(model: MoEModel, method: MethodConfig, history: ClientHistory) -> None:
    """Fold the watched batch's scores into the history, which is on the host: all layers at once."""
    if method.score == "random":
        return
    scores = {}
    for routing in model.routing:
        assert routing.evidence is not None
        if len(routing.evidence.g) > 0:
            scores[routing.layer.index] = score(method.score, routing.evidence, method.lam, method.beta)
    if scores:
        parts = torch.cat(list(scores.values())).cpu().split([len(values) for values in scores.values()])
        for layer, values in zip(scores, parts, strict=True):
            history.scores[layer].update(values)


def _synchronise(model: MoEModel) -> None:
    """Wait for what was handed to the device, so that a clock says how long it took."""
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)


def _choose_by_budget(
    model: MoEModel,
    method: MethodConfig,
    history: ClientHistory,
    budget: list[int] | None,
    draws: torch.Generator,
) -> None:
    """Let every layer choose, within the forward pass, which of its experts this batch trains (eq. 15)."""
    for routing in model.routing:
        routing.token_level = method.level == "token"
        routing.choose = None
    if budget is None:
        return

    def choose(layer: int, evidence: object, hit: Tensor) -> Tensor:
        routing = model.routing[layer]
        assert routing.evidence is not None
        if NEEDS[method.score] is None:
            contribution = score(method.score, routing.evidence, method.lam, method.beta, draws)
        else:
            # Decision: scores that a pass only shows at its end choose by what earlier batches showed.
            contribution = history.contribution()[layer].to(hit.device)
        return activation(contribution, hit, routing.resident(), budget[layer])

    for routing in model.routing:
        routing.choose = choose


def _mean_activation(budget: list[int] | None) -> float | None:
    return None if budget is None else sum(budget) / len(budget)


def _check_gradients(model: MoEModel) -> None:
    """Silent non-training is the classic bug of MoE fine-tuning, so the first backward pass is looked at."""
    trains_experts = any(state.trained is not None for state in model.states)
    if trains_experts and not any(any(flags) for flags in model.trained_now()):
        raise TrainingError("no expert received a gradient; this is a fault, please report it with the model's name")
    without = [name for name, router in model.routers.items() if router.grad is None]
    if without:
        raise TrainingError(f"{without[0]} received no gradient: the routers do not learn; set train.router = false")
    leaking = [name for name, p in model.model.named_parameters() if p.grad is not None and not p.requires_grad]
    if leaking:
        raise TrainingError(f"{leaking[0]} is frozen but received a gradient")


def _batches(
    examples: Sequence[Example], size: int, history: ClientHistory, seed: int, client: int
) -> Iterator[list[Example]]:
    """Endless batches, each epoch in its own order, going on where the last round ended."""
    size, order, epoch = min(size, len(examples)), torch.empty(0), -1
    while True:
        rows = []
        for _ in range(size):
            now, place = divmod(history.examples_seen, len(examples))
            if now != epoch:
                epoch, order = now, torch.randperm(len(examples), generator=generator(seed, "order", client, now))
            rows.append(examples[int(order[place])])
            history.examples_seen += 1
        yield rows
