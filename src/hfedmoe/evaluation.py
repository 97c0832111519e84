"""Measure a model on held-out examples: accuracy over choices, macro-F1, loss and perplexity."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hfedmoe.data.encoding import IGNORED, Encoder
from hfedmoe.data.rows import Example
from hfedmoe.errors import UserError

Scoring = Literal["auto", "first_token", "loglikelihood"]


@dataclass(frozen=True)
class Metrics:
    """How well a model does.

    `loss` is the mean negative log-probability (over the whole vocabulary) per token of the right answers: of their
    first tokens under first-token scoring, else of all of them. `perplexity` is its exponential. Both may be
    infinite or NaN: a broken model is reported as such. `accuracy` is None for completions. `macro_f1` is None unless
    all examples have the same choices (classification); labels that are neither true nor predicted anywhere are left
    out of its mean.
    """

    accuracy: float | None
    macro_f1: float | None
    loss: float
    examples: int
    perplexity: float


@dataclass(frozen=True)
class _Request:
    """One prompt with one continuation to score; `row` and `choice` say whose."""

    row: int
    choice: int
    prompt: list[int]
    answer: list[int]

    @property
    def sort_key(self) -> tuple[int, list[int], list[int]]:
        """Length first, against padding; then the tokens, so that batches do not depend on the examples' order."""
        return len(self.prompt) + len(self.answer), self.prompt, self.answer


def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    encoder: Encoder,
    batch_size: int,
    scoring: Scoring = "auto",
    on_batch: Callable[[int, int], None] | None = None,
) -> Metrics:
    """Score every example; the order of the examples does not change the result.

    Args:
        model: a transformers model; its training modes are restored afterwards.
        examples: all with choices, or all with completions.
        encoder: of the model's tokenizer and the task's template.
        batch_size: sequences per forward pass; loglikelihood needs one sequence per choice.
        scoring: `first_token` compares the logits of the choices' first tokens, one forward pass per example;
            `loglikelihood` compares the summed log-probability of every whole choice (`acc` of lm-evaluation-harness),
            the lower index winning ties; `auto` takes first tokens if they tell the choices of every example apart.
            Completions are never compared.
        on_batch: called after every batch with the sequences done and the sequences in all.

    Raises:
        UserError: there are no examples, an answer is too long, or first tokens do not tell the choices apart.
    """
    if not examples:
        raise UserError("there are no held-out rows to evaluate on; raise data.test_rows or data.test_share")
    completions = not examples[0].choices
    distinct = not completions and encoder.distinct_first_tokens(examples)
    if scoring == "first_token" and not distinct and not completions:
        raise UserError(
            "evaluation.scoring=first_token: some choices begin with the same token; use loglikelihood or auto"
        )
    first_token = distinct and scoring != "loglikelihood"

    requests = []
    for row, (example, prompt) in enumerate(zip(examples, encoder.prompts(examples), strict=True)):
        if completions or first_token:
            requests.append(
                _Request(row, example.answer, prompt, encoder.answer(example)[: 1 if first_token else None])
            )
        else:
            requests += [_Request(row, j, prompt, answer) for j, answer in enumerate(encoder.choices(example))]
    requests.sort(key=lambda request: request.sort_key)

    losses: list[float] = []  # per right answer, summed over its tokens
    tokens = 0
    scores: list[list[float]] = [[math.nan] * len(example.choices) for example in examples]
    with _evaluating(model):
        device = next(model.parameters()).device
        for start in range(0, len(requests), batch_size):
            chunk = requests[start : start + batch_size]
            batch = encoder.collate([r.prompt for r in chunk], [r.answer for r in chunk]).to(device)
            logits = model(**batch.model_inputs()).logits[:, -batch.targets.shape[1] :].float()  # [B, A, V]
            sums = answer_log_probs(logits, batch.targets).tolist()  # [B]
            for index, request in enumerate(chunk):
                example = examples[request.row]
                if first_token:
                    scores[request.row] = logits[index, -1, encoder.first_tokens(example)].tolist()
                elif not completions:
                    scores[request.row][request.choice] = sums[index]
                if completions or request.choice == example.answer:
                    losses.append(-sums[index])
                    tokens += len(request.answer)
            if on_batch is not None:
                on_batch(start + len(chunk), len(requests))

    loss = math.fsum(losses) / tokens
    try:
        perplexity = math.exp(loss)
    except OverflowError:
        perplexity = math.inf
    if completions:
        return Metrics(None, None, loss, len(examples), perplexity)
    truth = [example.answer for example in examples]
    # max returns the first of equals, so ties go to the lower index
    predicted = [max(range(len(row)), key=row.__getitem__) for row in scores]
    accuracy = sum(t == p for t, p in zip(truth, predicted, strict=True)) / len(examples)
    same_choices = all(example.choices == examples[0].choices for example in examples)
    return Metrics(accuracy, macro_f1(truth, predicted) if same_choices else None, loss, len(examples), perplexity)


def answer_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each answer, `[B]`, from logits `[B, A, V]` and targets `[B, A]` (-100: no target)."""
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return -losses.view_as(targets).sum(-1)


def macro_f1(truth: Sequence[int], predicted: Sequence[int]) -> float:
    """Mean F1 over the labels that are true or predicted somewhere."""
    scores = []
    for label in sorted({*truth, *predicted}):
        hits = sum(t == p == label for t, p in zip(truth, predicted, strict=True))
        scores.append(2 * hits / (truth.count(label) + predicted.count(label)))
    return math.fsum(scores) / len(scores)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
