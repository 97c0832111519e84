"""Measure a model on held-out examples: accuracy over choices, macro-F1, loss and perplexity.

Whole choices are scored like in EleutherAI's lm-evaluation-harness, so that results can be compared: `accuracy` is its
`acc`, `accuracy_norm` its `acc_norm`.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hfedmoe.data.encoding import IGNORED, Batch, Encoder
from hfedmoe.data.example import Example
from hfedmoe.data.fits import Room
from hfedmoe.data.pairs import fit
from hfedmoe.errors import UserError
from hfedmoe.server.prior import probabilities

Scoring = Literal["auto", "first_token", "loglikelihood"]

UNLIMITED = 10**18
"""A `model_max_length` from here on means no limit: tokenizers without one report 10^30."""


@dataclass(frozen=True)
class Metrics:
    """How well a model does.

    `loss` is the mean negative log-probability (over the whole vocabulary) per token of the right answers: of their
    first tokens with first-token scoring, else of all tokens. `perplexity` is its exponential. Both may be infinite or
    NaN if the model is broken. `accuracy` is None for completions. `macro_f1` is None unless all examples have the same
    choices, which are labels (classification); its mean leaves out labels that are never true and never predicted.
    `choice_loss` is the mean negative log-probability of the right choice among all of its row, as trained with
    `train.loss = "choices"`; None unless it was asked for.
    `accuracy_norm` divides the log-probability of a choice by its length in characters; None unless whole choices are
    compared.
    """

    accuracy: float | None
    macro_f1: float | None
    loss: float
    examples: int
    perplexity: float
    accuracy_norm: float | None = None
    choice_loss: float | None = None
    predicted: tuple[int, ...] | None = field(default=None, repr=False, compare=False)
    """The chosen answer of every example, as an index into its choices; None for completions."""

    scores: tuple[tuple[float, ...], ...] | None = field(default=None, repr=False, compare=False)
    """What was compared: of every example the logit or the log-probability of each of its choices; None likewise."""

    @property
    def trained_loss(self) -> float:
        """The loss that the clients train: among the choices, or else over the vocabulary."""
        return self.loss if self.choice_loss is None else self.choice_loss

    def figures(self) -> dict[str, Any]:
        """All figures by name, without those of single rows."""
        return {name: value for name, value in vars(self).items() if name not in ("predicted", "scores")}


@dataclass(frozen=True)
class _Request:
    """One prompt and the answers to score after it; `row` is its example, `choices` are the indices of the answers.

    The answers differ only in their last token, so one forward pass scores all of them.
    """

    row: int
    choices: list[int]
    prompt: list[int]
    answers: list[list[int]]

    @property
    def sort_key(self) -> tuple[int, list[int], list[int]]:
        """Length first, for less padding; then the tokens, so that batches do not depend on the examples' order."""
        return len(self.prompt) + len(self.answers[0]), self.prompt, self.answers[0]


def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    encoder: Encoder,
    batch_size: int,
    scoring: Scoring = "auto",
    on_batch: Callable[[int, int], None] | None = None,
    before_pass: Callable[[Batch], None] | None = None,
    among_choices: bool = False,
) -> Metrics:
    """Score every example; the order of the examples does not change the result.

    Args:
        model: a transformers model; its training modes are restored afterwards.
        examples: all with choices, or all with completions.
        encoder: for the model's tokenizer and the task's template.
        batch_size: sequences per forward pass; loglikelihood needs one sequence per choice, or per group of choices
            that differ only in their last token.
        scoring: `first_token` compares the logits of the choices' first tokens, one forward pass per example;
            `loglikelihood` compares the summed log-probability of every whole choice, and the lower index wins ties;
            `auto` uses first tokens if training does (classification, labels that differ in their first token), else
            whole choices. Prompts of whole choices are cut at the start to fit. Completions are never compared.
        on_batch: called after every batch with the number of sequences done and of all sequences.
        before_pass: called with every batch before its forward pass, for example so that experts skip its padding.
        among_choices: also compute `choice_loss`, because that is what was trained.

    Raises:
        UserError: there are no examples, an answer is too long, or choices do not differ in their first token.
    """
    if not examples:
        raise UserError("there are no held-out rows to evaluate on; raise data.test_rows or data.test_share")
    completions = not examples[0].choices
    first_token = not completions and _by_first_token(examples, encoder, scoring)
    if completions or first_token:
        end = 1 if first_token else None
        requests = [
            _Request(row, [example.answer], prompt, [answer[:end]])
            for row, (example, (prompt, answer)) in enumerate(zip(examples, encoder.encoded(examples), strict=True))
        ]
    else:
        requests = _choice_requests(examples, encoder, longest_input(model, encoder.tokenizer))
    requests.sort(key=lambda request: request.sort_key)

    losses: list[float] = []  # per right answer, summed over its tokens
    tokens = 0
    scores: list[list[float]] = [[math.nan] * len(example.choices) for example in examples]
    with _evaluating(model):
        device = next(model.parameters()).device
        for start in range(0, len(requests), batch_size):
            chunk = requests[start : start + batch_size]
            batch = encoder.collate([r.prompt for r in chunk], [r.answers[0] for r in chunk]).to(device)
            if before_pass is not None:
                before_pass(batch)
            logits = model(**batch.model_inputs()).logits[:, -batch.targets.shape[1] :].float()  # [B, A, V]
            sums = _sums(logits, batch.targets, chunk, encoder)
            last = logits[:, -1].cpu() if first_token else logits  # one copy per batch, not one per example
            for index, request in enumerate(chunk):
                example = examples[request.row]
                if first_token:
                    scores[request.row] = last[index, encoder.first_tokens(example)].tolist()
                for choice, answer in zip(request.choices, request.answers, strict=True):
                    total = next(sums)
                    if not completions and not first_token:
                        scores[request.row][choice] = total
                    if completions or choice == example.answer:
                        losses.append(-total)
                        tokens += len(answer)
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
    predicted = [best(row) for row in scores]
    same_choices = all(example.choices == examples[0].choices for example in examples)
    normed = None
    if not first_token:
        lengths = [[len(choice) for choice in example.choices] for example in examples]
        # An empty choice never wins: the harness divides by its length of 0 and gets minus infinity.
        shares = [
            [s / n if n else -math.inf for s, n in zip(*row, strict=True)] for row in zip(scores, lengths, strict=True)
        ]
        normed = _hit_rate(truth, [best(row) for row in shares])
    return Metrics(
        accuracy=_hit_rate(truth, predicted),
        macro_f1=macro_f1(truth, predicted) if same_choices and not encoder.whole_prompts else None,
        loss=loss,
        examples=len(examples),
        perplexity=perplexity,
        accuracy_norm=normed,
        choice_loss=_choice_loss(truth, scores) if among_choices else None,
        predicted=tuple(predicted),
        scores=tuple(map(tuple, scores)),
    )


def room_of(model: nn.Module, tokenizer: Any) -> Room:
    """The limits of a model's input: how many tokens, and the size of its vocabulary."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    rows = getattr(embedding, "num_embeddings", None)
    return Room(positions(model), longest_input(model, tokenizer), rows)


def longest_input(model: nn.Module, tokenizer: Any) -> int:
    """How many tokens fit into one input, found as in lm-evaluation-harness: config, tokenizer, else 2048."""
    known = positions(model)
    if known is not None:
        return known
    length = tokenizer.model_max_length
    return int(length) if length < UNLIMITED else 2048


def positions(model: nn.Module) -> int | None:
    """How many tokens fit into one input by the model's config; None: it has no limit."""
    config: Any = model.config
    config = getattr(config, "text_config", None) or config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    return None


def _by_first_token(examples: Sequence[Example], encoder: Encoder, scoring: Scoring) -> bool:
    if scoring == "loglikelihood" or (scoring == "auto" and not encoder.first_token_only):
        return False
    distinct = encoder.distinct_first_tokens(examples)
    if scoring == "first_token" and not distinct:
        raise UserError(
            "evaluation.scoring=first_token: some choices begin with the same token; use loglikelihood or auto"
        )
    return distinct


def _choice_requests(examples: Sequence[Example], encoder: Encoder, longest: int) -> list[_Request]:
    """One request per choice; choices of a row that differ only in their last token share one."""
    if encoder.whole_prompts:
        pairs = [
            [fit(*pair, longest, encoder.encoder_decoder, str(example)) for pair in row]
            for example, row in zip(examples, encoder.pairs(examples), strict=True)
        ]
    else:
        prompts = encoder.prompts(examples)
        pairs = [
            [(prompt, answer) for answer in encoder.choices(example)]
            for example, prompt in zip(examples, prompts, strict=True)
        ]
    requests: list[_Request] = []
    for row, choices in enumerate(pairs):
        groups: dict[tuple[tuple[int, ...], tuple[int, ...]], _Request] = {}
        for choice, (prompt, answer) in enumerate(choices):
            key = (tuple(prompt), tuple(answer[:-1]))
            request = groups.setdefault(key, _Request(row, [], prompt, []))
            request.choices.append(choice)
            request.answers.append(answer)
        requests += groups.values()
    return requests


def _sums(logits: Tensor, targets: Tensor, chunk: Sequence[_Request], encoder: Encoder) -> Iterator[float]:
    """Log-probability of every answer of the chunk, from logits `[B, A, V]` and the `targets` of the first answers."""
    if any(len(request.answers) > 1 for request in chunk):
        owners = [index for index, request in enumerate(chunk) for _ in request.answers]
        answers = [answer for request in chunk for answer in request.answers]
        logits = logits[owners]
        targets = encoder.collate(answers, answers).targets.to(logits.device)
    return iter(answer_log_probs(logits, targets).tolist())


def best(scores: Sequence[float]) -> int:
    """The index of the highest score; ties go to the lower index."""
    return max(range(len(scores)), key=scores.__getitem__)


def _choice_loss(truth: Sequence[int], scores: Sequence[Sequence[float]]) -> float:
    """Mean cross entropy of the right choice among all of its row, from logits or log-probabilities."""
    losses = (
        -math.log(max(probabilities(row)[right], sys.float_info.min)) for right, row in zip(truth, scores, strict=True)
    )
    return math.fsum(losses) / len(truth)


def _hit_rate(truth: Sequence[int], predicted: Sequence[int]) -> float:
    return sum(t == p for t, p in zip(truth, predicted, strict=True)) / len(truth)


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
    """Evaluation mode without gradients; restores the mode of every module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
