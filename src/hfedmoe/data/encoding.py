"""Encode examples as tensors: prompts are cut to fit, answers are aligned with the logits that predict them.

Each piece is tokenised on its own: the template's head, the text, the template's tail, and the answer. So the text
can be cut at an exact number of tokens, and an answer has the same tokens in training and in evaluation. White space
between two pieces belongs to the second one, as in the vocabularies of language models.

Two exceptions: conversations are written by the tokenizer's chat template, and multiple choice is evaluated on whole
prompts with `Encoder.pairs`, tokenised as in lm-evaluation-harness.

Shapes: `B` examples, `S` longest input, `A` longest answer, `N` choices.
"""

import sys
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hfedmoe.data.chat import ChatForm, render
from hfedmoe.data.example import Example
from hfedmoe.data.pairs import encode_pairs, special_tokens
from hfedmoe.data.task import Task
from hfedmoe.errors import UserError

IGNORED = -100  # the target value that torch's cross entropy ignores


@dataclass
class Batch:
    """The inputs and targets of one forward pass.

    Causal models: `input_ids` is prompt + answer without its last token, padded on the left, and the logits of the
    last `A` positions predict `targets`. Encoder-decoder models: `input_ids` is the prompt, padded on the right, and
    the decoder's logits over `decoder_input_ids` predict `targets`. `targets` is -100 where nothing is predicted.
    """

    input_ids: Tensor  # [B, S] int64
    attention_mask: Tensor  # [B, S] int64, 0 on padding
    targets: Tensor  # [B, A] int64
    answers: Tensor  # [B] int64, index of the right choice; -1 for completions
    decoder_input_ids: Tensor | None = None  # [B, A] int64, encoder-decoder models only
    choice_tokens: Tensor | None = None  # [B, N] int64, first tokens of the choices, if they are all different

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **tensors)

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments for the model's forward; its logits are `[B, A, V]`, aligned with `targets`."""
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "use_cache": False}
        if self.decoder_input_ids is not None:
            return inputs | {"decoder_input_ids": self.decoder_input_ids}
        # Models with learned positions would count the padding on the left.
        position_ids = (self.attention_mask.cumsum(-1) - 1).clamp(min=0)
        return inputs | {"position_ids": position_ids, "logits_to_keep": self.targets.shape[1]}


@dataclass(frozen=True)
class Frame:
    """What an encoder puts around a text: tokens before and after it, and at most `room` tokens of it between them.

    `lead` is white space of the template that is tokenised with the text, which `begins` the prompt or does not.
    """

    head: list[int]
    tail: list[int]
    room: int
    lead: str
    begins: bool


class Encoder:
    """Tokenises examples for one model and one template.

    A prompt begins with the special tokens that the tokenizer adds at the front (usually BOS, or none). For
    encoder-decoder models it also ends with those that the tokenizer appends (T5: `</s>`). A completion ends with the
    tokenizer's end-of-sequence token, if it has one; a choice does not.

    Causal models: spaces at the end of the template move to the answer, a line break at the end stays. If the template
    ends without white space, the answer gets a space in front, unless it begins with white space. Encoder-decoder
    models: the decoder begins with the unchanged answer.

    Anything longer than `max_tokens` is cut. A prompt loses the end of its text, or the beginning with `keep_end`; a
    conversation always loses its beginning. Completions and answers of conversations lose their end. A choice that is
    too long is an error, because parts of choices cannot be compared.

    Args:
        tokenizer: from transformers.
        template: the prompt, with `{text}` once.
        max_tokens: maximum length of a prompt, and of an answer.
        encoder_decoder: `config.is_encoder_decoder` of the model.
        decoder_start_token_id: from the model's config, for encoder-decoder models.
        first_token_only: the default of `training_batch`.
        whole_prompts: for multiple choice: answers are compared with `pairs`.
        keep_end: cut prompts at the beginning, because the completion continues their end.

    Raises:
        UserError: the template leaves no room for the text, or the decoder has no start token.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        *,
        max_tokens: int,
        encoder_decoder: bool = False,
        decoder_start_token_id: int | None = None,
        first_token_only: bool = False,
        whole_prompts: bool = False,
        keep_end: bool = False,
    ) -> None:
        if encoder_decoder and decoder_start_token_id is None:
            raise UserError("the model is an encoder-decoder, but its config has no decoder_start_token_id; set one")
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.encoder_decoder = encoder_decoder
        self.decoder_start_token_id = decoder_start_token_id
        self.first_token_only = first_token_only
        self.whole_prompts = whole_prompts
        self.keep_end = keep_end
        self.pad_token_id = next(
            (token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0
        )
        self.chat = ChatForm()
        """How conversations are written; set after construction."""
        self._choice_tokens: dict[str, list[int]] = {}

        self.template = template
        head, tail = template.split("{text}")
        self._text_lead = head[len(head.rstrip()) :]
        self._answer_lead = "" if encoder_decoder else tail[len(tail.rstrip(" \t")) :]
        tail = tail.rstrip() if encoder_decoder else tail.rstrip(" \t")
        self._at_line_start = tail.endswith("\n")
        prefix, suffix = special_tokens(tokenizer)
        self._head = prefix + (self._tokens([head.rstrip()])[0] if head.strip() else [])
        self._starts_with_text = not head.strip()
        self._tail = (self._tokens([tail], after="a")[0] if tail else []) + (suffix if encoder_decoder else [])
        self._room = max_tokens - len(self._head) - len(self._tail)
        if self._room < 1:
            raise UserError(
                f"data.template takes {len(self._head) + len(self._tail)} tokens, which leaves none of "
                f"data.max_tokens={max_tokens} for the text; shorten the template or raise data.max_tokens"
            )

    @classmethod
    def for_task(
        cls,
        tokenizer: Any,
        task: Task,
        max_tokens: int,
        encoder_decoder: bool = False,
        decoder_start_token_id: int | None = None,
    ) -> "Encoder":
        """The encoder of a task; classification trains on first tokens only, if they differ for all labels."""
        encoder = cls(
            tokenizer,
            task.template,
            max_tokens=max_tokens,
            encoder_decoder=encoder_decoder,
            decoder_start_token_id=decoder_start_token_id,
        )
        labelled = (task.train or task.test)[:1]
        encoder.first_token_only = task.kind == "classification" and encoder.distinct_first_tokens(labelled)
        encoder.whole_prompts = task.kind == "choices"
        encoder.keep_end = task.kind == "completion"
        return encoder

    def encoded(self, examples: Sequence[Example]) -> list[tuple[list[int], list[int]]]:
        """The tokens of every prompt and of its right answer: a choice, or a completion and end-of-sequence.

        Raises:
            UserError: an answer has no tokens, a choice is longer than `max_tokens`, or the chat template refuses a
                conversation.
        """
        talks = iter(self._chats([example for example in examples if example.messages]))
        others = [example for example in examples if not example.messages]
        rest = iter(zip(self._prompts(others), self._answers(others), strict=True))
        return [next(talks) if example.messages else next(rest) for example in examples]

    def prompts(self, examples: Sequence[Example]) -> list[list[int]]:
        """The tokens of every prompt, at most `max_tokens`; the template itself is never cut."""
        talks = iter(self._chats([example for example in examples if example.messages]))
        rest = iter(self._prompts([example for example in examples if not example.messages]))
        return [next(talks)[0] if example.messages else next(rest) for example in examples]

    @property
    def frame(self) -> Frame:
        """What is around the text of every prompt; not for conversations."""
        return Frame(self._head, self._tail, self._room, self._text_lead, self._starts_with_text)

    def without_limit(self) -> "Encoder":
        """The same encoder without a maximum length."""
        whole = copy(self)
        whole.max_tokens = whole._room = sys.maxsize
        whole._choice_tokens = {}  # a cache of its own: the tokens in this one passed the length check
        return whole

    def pairs(self, examples: Sequence[Example]) -> list[list[tuple[list[int], list[int]]]]:
        """For every choice of every example, the tokens of the whole prompt and choice, as in lm-evaluation-harness.

        The harness's `target_delimiter` is a space, or empty if the template ends with white space.
        """
        delimiter = "" if self.template[-1:].isspace() else " "
        head, tail = self.template.split("{text}")
        texts = [(head + e.text + tail, delimiter + choice) for e in examples for choice in e.choices]
        encoded = iter(encode_pairs(self.tokenizer, texts, self.encoder_decoder))
        return [[next(encoded) for _ in example.choices] for example in examples]

    def choices(self, example: Example) -> list[list[int]]:
        """The tokens of every choice of one example. Raises UserError if one is longer than `max_tokens`."""
        for choice in example.choices:
            if choice not in self._choice_tokens:
                self._choice_tokens[choice] = self._checked(self._answer_tokens([choice])[0], example)
        return [self._choice_tokens[choice] for choice in example.choices]

    def first_tokens(self, example: Example) -> list[int]:
        """The first token of every choice, in order."""
        return [tokens[0] for tokens in self.choices(example)]

    def distinct_first_tokens(self, examples: Sequence[Example]) -> bool:
        """Whether all choices of every example have different first tokens (False for completions)."""
        seen: dict[tuple[str, ...], bool] = {}  # classification repeats the same choices in every row
        for example in examples:
            if example.choices not in seen:
                first = self.first_tokens(example)
                seen[example.choices] = len(first) > 0 and len(set(first)) == len(first)
            if not seen[example.choices]:
                return False
        return True

    def training_batch(self, examples: Sequence[Example], first_token_only: bool | None = None) -> Batch:
        """Prompts with their right answers.

        Args:
            examples: at least one.
            first_token_only: predict only the first token of each answer, so that `A` is 1; None: the encoder's
                setting.

        Raises:
            UserError: an answer is too long, or `first_token_only` but two choices have the same first token.
        """
        distinct = self.distinct_first_tokens(examples)
        prompts, answers = map(list, zip(*self.encoded(examples), strict=True))
        if self.first_token_only if first_token_only is None else first_token_only:
            if not distinct:
                raise UserError("two choices have the same first token; train on whole answers")
            answers = [answer[:1] for answer in answers]
        batch = self.collate(prompts, answers)
        batch.answers = torch.tensor([example.answer if example.choices else -1 for example in examples])
        if distinct and len({len(example.choices) for example in examples}) == 1:
            batch.choice_tokens = torch.tensor([self.first_tokens(example) for example in examples])
        return batch

    def collate(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> Batch:
        """Pad tokenised prompts and answers into a batch (without `choice_tokens`, `answers` all -1)."""
        unknown = torch.full((len(prompts),), -1)
        if self.encoder_decoder:
            starts = [[self.decoder_start_token_id, *answer[:-1]] for answer in answers]
            return Batch(
                input_ids=_padded(prompts, self.pad_token_id),
                attention_mask=_padded([[1] * len(prompt) for prompt in prompts], 0),
                targets=_padded(answers, IGNORED),
                answers=unknown,
                decoder_input_ids=_padded(starts, self.pad_token_id),
            )
        inputs = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
        return Batch(
            input_ids=_padded(inputs, self.pad_token_id, left=True),
            attention_mask=_padded([[1] * len(tokens) for tokens in inputs], 0, left=True),
            targets=_padded(answers, IGNORED, left=True),
            answers=unknown,
        )

    def _chats(self, examples: Sequence[Example]) -> list[tuple[list[int], list[int]]]:
        """Prompts and answers of conversations; the template writes the special tokens, so none are added."""
        if not examples:
            return []
        written = [self._render(example) for example in examples]
        prompts = self._tokens([prompt for prompt, _ in written])
        if self.encoder_decoder:
            answers = self._tokens([answer for _, answer in written])
        else:
            answers = self._behind([(p, tokens, a) for (p, a), tokens in zip(written, prompts, strict=True)])
        return [
            (prompt[-self.max_tokens :], self._checked(answer[: self.max_tokens], example))
            for prompt, answer, example in zip(prompts, answers, examples, strict=True)
        ]

    def _render(self, example: Example) -> tuple[str, str]:
        try:
            return render(self.tokenizer, example, self.chat)
        except UserError as error:
            raise UserError(f"{example}: {error}") from None

    def _prompts(self, examples: Sequence[Example]) -> list[list[int]]:
        """Prompts of examples without messages."""
        if not examples:
            return []
        texts = [self._text_lead + example.text for example in examples]
        pieces = self._tokens(texts, after="" if self._starts_with_text else "a")
        part = slice(-self._room, None) if self.keep_end else slice(self._room)
        return [self._head + piece[part] + self._tail for piece in pieces]

    def _answers(self, examples: Sequence[Example]) -> list[list[int]]:
        """Answers of examples without messages."""
        written = iter(self._answer_tokens([example.completion for example in examples if not example.choices]))
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        return [
            self.choices(example)[example.answer]
            if example.choices
            else self._checked([*next(written), *end][: self.max_tokens], example)
            for example in examples
        ]

    def _answer_tokens(self, answers: list[str]) -> list[list[int]]:
        if self.encoder_decoder or not answers:
            return self._tokens(answers) if answers else []
        lead = self._answer_lead or ("" if self._at_line_start else " ")
        pieces = [answer if answer[:1].isspace() else lead + answer for answer in answers]
        return self._tokens(pieces, after="a\n" if self._at_line_start else "a")

    def _checked(self, tokens: list[int], example: Example) -> list[int]:
        if not tokens:
            raise UserError(f"{example}: an answer becomes no tokens; change it or remove the row")
        if len(tokens) > self.max_tokens:
            raise UserError(
                f"{example}: an answer has {len(tokens)} tokens, but may have {self.max_tokens}; shorten it or raise "
                "data.max_tokens"
            )
        return tokens

    def _tokens(self, pieces: list[str], after: str = "") -> list[list[int]]:
        """The tokens of pieces that follow the text `after`.

        Some tokenizers (SentencePiece) mark the beginning of every string as a new word; a piece from the middle of a
        prompt must not get this mark. If a token would join the end of `after` with the piece, the piece is tokenised
        alone.
        """
        if after:
            lead = self._tokens([after])[0]
            return self._behind([(after, lead, piece) for piece in pieces])
        tokens: list[list[int]] = self.tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
        return tokens

    def _behind(self, joints: Sequence[tuple[str, list[int], str]]) -> list[list[int]]:
        """The tokens of every piece after its text; `joints` holds text, tokens of the text, and piece."""
        joined = self._tokens([text + piece for text, _, piece in joints])
        return [
            long[len(lead) :] if long[: len(lead)] == lead else self._tokens([piece])[0]
            for long, (_, lead, piece) in zip(joined, joints, strict=True)
        ]


def _padded(rows: Sequence[Sequence[Any]], value: int, left: bool = False) -> Tensor:
    """Rows of unequal length as one int64 tensor."""
    width = max(len(row) for row in rows)
    padded = torch.full((len(rows), width), value)
    for index, row in enumerate(rows):
        start = width - len(row) if left else 0
        padded[index, start : start + len(row)] = torch.tensor(row)
    return padded
