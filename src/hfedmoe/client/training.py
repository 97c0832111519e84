"""The local loop of one client: a few optimizer steps on its resident experts."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hfedmoe.client.batches import endless_batches, tokens_of
from hfedmoe.client.history import ClientHistory
from hfedmoe.client.learner import Learner
from hfedmoe.client.scoring import Choice, ranked_by, remember_scores
from hfedmoe.client.statistics import RoundStatistics
from hfedmoe.data.encoding import Batch
from hfedmoe.data.losses import answer_loss, label_adjustment
from hfedmoe.device.pace import Pace
from hfedmoe.errors import TrainingError
from hfedmoe.events import Work
from hfedmoe.moe.model import MoEModel
from hfedmoe.seeds import derive


class OutOfTimeError(TrainingError):
    """Even one step takes much longer than the deadline. The measured time is in the client's history."""


@dataclass
class LocalUpdate:
    """What one round of local training measured; the trained tensors are in the model."""

    usage: list[Tensor]
    """Per layer float32 [E], u_c of eq. 16 over the round's samples."""
    importance: list[Tensor]
    """Per layer float32 [E], s_c of eq. 5, the mean over the round's batches."""
    tokens: list[Tensor]
    """Per layer float32 [E], tokens that each expert processed."""
    trained: list[Tensor]
    """Per layer bool [E], experts that received at least one optimizer step."""
    work: Work
    """Without the memory peak and the deadline, which the loop does not know."""


def train(
    learner: Learner,
    history: ClientHistory,
    *,
    activation_budget: list[int] | None = None,
    lr_factor: float = 1.0,
    on_step: Callable[[int, float], None] | None = None,
    pace: Pace | None = None,
) -> LocalUpdate:
    """Train the model's trainable tensors in place; updates the client's history.

    Without a pace, the same seed and history give the same bits. With a pace, the clock decides how many steps are done
    and how many experts they train, so the results of a repeated or resumed run are only similar.

    Args:
        activation_budget: experts per layer that one batch may train; None: all resident ones.
        lr_factor: the factor on train.lr in this round.
        on_step: called with (step, loss) after every step.
        pace: keeps a deadline; None: all steps are done, each within the activation budget.

    Raises:
        TrainingError: the loss is not finite, or nothing that should train received a gradient.
        OutOfTimeError: the pace has given up the round.
    """
    model, settings = learner.model, learner.train
    clock = time.perf_counter if pace is None else pace.clock
    started = clock()
    if pace is not None:
        pace.begin()
    torch.manual_seed(derive(learner.seed, "train", learner.number, history.rounds))
    parameters = model.parameters()
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.lr * lr_factor, weight_decay=settings.weight_decay, fused=True
    )
    loss_of = _Loss(learner, parameters)
    statistics, losses = RoundStatistics(model), list[float]()
    choice, ranked = Choice(learner, history), ranked_by(learner)
    choice.within(activation_budget)
    model.model.train()
    for routing in model.routing:
        routing.with_gradient = learner.method.routing_term is not None and history.federation is not None
    batches = endless_batches(learner, history)
    try:
        for step in range(1, settings.steps + 1):
            if pace is not None:
                allowed = pace.next()
                if allowed is None:
                    break
                choice.within(activation_budget if allowed == pace.most else allowed)
            batch = learner.encoder.training_batch(next(batches)).to(model.device)
            model.watch(tokens_of(batch), None if ranked is None else ranked.needs)
            loss = loss_of.answers(model.model(**batch.model_inputs()).logits, batch)
            whole = loss if history.federation is None else loss + loss_of.routing(history.federation)
            if pace is not None:
                _synchronise(model)
                if (taken := pace.give_up()) is not None:
                    raise OutOfTimeError(
                        f"the forward pass of its first step took {taken:.1f} s, "
                        f"and its deadline is {pace.deadline_s:g} s"
                    )
            whole.backward()
            statistics.note_trained(model)  # before the local term, which adds gradients that this batch does not have
            loss_of.add_local_term(optimizer)
            losses.append(loss.item())  # this waits for the device, so the backward pass is queued first
            if not math.isfinite(losses[-1]):
                raise TrainingError(f"the loss is {losses[-1]} in step {step}; lower train.lr (now {settings.lr:g})")
            if step == 1:
                _check_gradients(model)
            if settings.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            for routing in model.routing:
                statistics.add(routing, learner.settings.lam)
            remember_scores(learner, history, learner.method.score(learner.settings))
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
        usage=statistics.usage(),
        importance=statistics.importance(),
        tokens=statistics.tokens(),
        trained=statistics.trained(model),
        work=Work(
            examples=len(learner.examples),
            steps=len(losses),
            steps_wanted=settings.steps,
            first_loss=losses[0] if losses else None,
            last_loss=losses[-1] if losses else None,
            mean_loss=math.fsum(losses) / len(losses) if losses else None,
            seconds=clock() - started,
            activation=_mean_activation(activation_budget) if pace is None else pace.mean_level,
        ),
    )


class _Loss:
    """What a client minimises: the cross entropy of the answers, and the method's local term where it has one."""

    def __init__(self, learner: Learner, parameters: list[Tensor]) -> None:
        self._learner, self._parameters = learner, parameters
        self._adjustment = label_adjustment(learner.examples, learner.logit_adjustment)
        self._start = [parameter.detach().clone() for parameter in parameters if learner.method.local_term is not None]

    def answers(self, logits: Tensor, batch: Batch) -> Tensor:
        """The cross entropy of a batch's answers: the loss that is reported."""
        return answer_loss(logits, batch, self._learner.train.loss == "choices", self._adjustment)

    def routing(self, federation: list[Tensor]) -> Tensor | float:
        """The method's own term for the routing of the batch; 0 if it has none."""
        term = self._learner.method.routing_term
        if term is None:
            return 0.0
        means = [routing.batch_mean() for routing in self._learner.model.routing]
        if not any(mean.requires_grad for mean in means):
            raise TrainingError(
                "the method's routing term has no gradient; set train.router = true and "
                "train.gradient_checkpointing = false"
            )
        return term(means, federation, self._learner.settings)

    def add_local_term(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the gradient of the method's local term for tensors trained so far; all others have not changed."""
        term = self._learner.method.local_term
        if term is None:
            return
        moved = [
            (now, start)
            for now, start in zip(self._parameters, self._start, strict=True)
            if now.grad is not None or now in optimizer.state
        ]
        term([now for now, _ in moved], [start for _, start in moved], self._learner.settings).backward()


def _synchronise(model: MoEModel) -> None:
    """Wait until the device has finished its work, so that the measured time is right."""
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)


def _mean_activation(budget: list[int] | None) -> float | None:
    return None if budget is None else sum(budget) / len(budget)


def _check_gradients(model: MoEModel) -> None:
    """Check the first backward pass: experts that silently do not train are a classic bug of MoE fine-tuning."""
    trains_experts = any(state.trained is not None for state in model.states)
    if trains_experts and not any(any(flags) for flags in model.trained_now()):
        raise TrainingError("no expert received a gradient; this is a bug, please report it with the model's name")
    without = [name for name, router in model.routers.items() if router.grad is None]
    if without:
        raise TrainingError(f"{without[0]} received no gradient: the routers do not learn; set train.router = false")
    leaking = [name for name, p in model.model.named_parameters() if p.grad is not None and not p.requires_grad]
    if leaking:
        raise TrainingError(f"{leaking[0]} is frozen but received a gradient; this is a bug, please report it")
