"""Check every example before training: a bad row must stop the run at its start, not a client in the middle of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hfedmoe.data.encoding import Encoder
from hfedmoe.data.example import Example
from hfedmoe.data.pairs import fit
from hfedmoe.data.task import Task
from hfedmoe.errors import UserError

CHUNK = 256
"""Examples tokenised at once."""


@dataclass(frozen=True)
class Room:
    """The limits of a model.

    Args:
        positions: maximum tokens of one input, from the model's config; None: unknown or no limit.
        longest: the same, or an assumed value if it is None; prompts of multiple choice are cut to it.
        vocabulary: rows of the embedding; None: unknown.
    """

    positions: int | None
    longest: int
    vocabulary: int | None = None


@dataclass
class _Counts:
    examples: int = 0
    cut: int = 0
    answers_cut: int = 0


def check_task(task: Task, watch: Sequence[Example], encoder: Encoder, room: Room) -> list[str]:
    """Encode all examples as training and evaluation will.

    Returns:
        Warnings: answers are cut, or more than half of the training examples are.

    Raises:
        UserError: an example cannot be encoded or does not fit into the model; its file and line are named.
    """
    held_out = [*task.test, *watch]
    check_vocabulary([*task.train, *held_out], encoder, room.vocabulary)
    if task.kind == "classification":
        # Texts are cut to fit, and their beginning is enough: only the labels can be wrong.
        _check_labels([*task.train, *held_out], encoder, room)
        return []
    train, test = _Counts(), _Counts()
    _check_trained_choices(task.train, encoder)
    for chunk in _chunks(task.train):
        _check(chunk, encoder, room, train)
    for chunk in _chunks(held_out):
        if task.kind == "choices":
            for example, pairs in zip(chunk, encoder.pairs(chunk), strict=True):
                _check_choices(example, [answer for _, answer in pairs], encoder)
                _check_told_apart(example, pairs)
                for prompt, answer in pairs:
                    fit(prompt, answer, room.longest, encoder.encoder_decoder, str(example))
        else:
            _check(chunk, encoder, room, test)
    warnings = []
    if train.cut > train.examples / 2:
        share = train.cut / train.examples
        warnings.append(
            f"data.max_tokens={encoder.max_tokens} cuts about {share:.0%} of the training examples; raise it"
        )
    if answers_cut := train.answers_cut + test.answers_cut:
        warnings.append(
            f"data.max_tokens={encoder.max_tokens} cuts the end of {answers_cut} of "
            f"{train.examples + test.examples} answers; raise it, or leave these rows out"
        )
    return warnings


def _check_labels(examples: Sequence[Example], encoder: Encoder, room: Room) -> None:
    seen: dict[tuple[str, ...], int] = {}  # choices -> tokens of the longest one
    for example in examples:
        if example.choices not in seen:
            _check_words(example, encoder)
            seen[example.choices] = max(map(len, encoder.choices(example)))
    if not _never_exceeds(encoder, max(seen.values(), default=1), room):
        for chunk in _chunks(examples):
            for example, prompt in zip(chunk, encoder.prompts(chunk), strict=True):
                _check_length(example, prompt, seen[example.choices], encoder, room)


def check_vocabulary(examples: Sequence[Example], encoder: Encoder, vocabulary: int | None) -> None:
    """Raise UserError for a token without a row in the embedding; a padding token without one is replaced by 0.

    A tokenizer may have more tokens than the model: tokens were added, or it belongs to another model.
    """
    if vocabulary is None:
        return
    if encoder.pad_token_id >= vocabulary:
        encoder.pad_token_id = 0
    if len(encoder.tokenizer) <= vocabulary and max(encoder.tokenizer.all_special_ids, default=0) < vocabulary:
        return
    for chunk in _chunks(examples):
        answers = encoder.without_limit().encoded(chunk)
        for example, (prompt, answer) in zip(chunk, answers, strict=True):
            choices = [token for tokens in encoder.choices(example) for token in tokens]
            beyond = next((token for token in (*prompt, *answer, *choices) if token >= vocabulary), None)
            if beyond is not None:
                text = encoder.tokenizer.convert_ids_to_tokens(beyond)
                raise UserError(
                    f'{example}: has the token "{text}" with the number {beyond}, but the model\'s embedding has '
                    f"{vocabulary} rows; use the tokenizer that belongs to the model, or change this text"
                )


def _check_words(example: Example, encoder: Encoder) -> None:
    """Raise UserError if two label words become the same tokens, or one becomes only unknown tokens."""
    unknown, seen = encoder.tokenizer.unk_token_id, dict[tuple[int, ...], str]()
    for word, tokens in zip(example.choices, map(tuple, encoder.choices(example)), strict=True):
        if unknown is not None and set(tokens) == {unknown}:
            raise UserError(
                f'the tokenizer does not know the label word "{word}": it becomes {encoder.tokenizer.unk_token}; give '
                "the label another word with data.label_words"
            )
        if tokens in seen:
            raise UserError(
                f'the label words "{seen[tokens]}" and "{word}" become the same tokens; give one of them another word '
                "with data.label_words"
            )
        seen[tokens] = word


def _check(chunk: Sequence[Example], encoder: Encoder, room: Room, counts: _Counts) -> None:
    for example in chunk:
        encoder.choices(example)  # all of them are compared, not only the right one
    for example, (prompt, answer) in zip(chunk, encoder.without_limit().encoded(chunk), strict=True):
        _check_length(example, prompt, len(answer), encoder, room)
        counts.examples += 1
        counts.cut += max(len(prompt), len(answer)) > encoder.max_tokens
        counts.answers_cut += len(answer) > encoder.max_tokens


def _check_trained_choices(examples: Sequence[Example], encoder: Encoder) -> None:
    """`_check_choices` and `_check_told_apart` for training rows, once for rows with the same choices and answer."""
    seen: set[tuple[tuple[str, ...], int]] = set()
    for example in examples:
        if example.choices and (example.choices, example.answer) not in seen:
            seen.add((example.choices, example.answer))
            tokens = encoder.choices(example)
            _check_choices(example, tokens, encoder)
            _check_told_apart(example, tokens)


def _check_choices(example: Example, choices: Sequence[list[int]], encoder: Encoder) -> None:
    """Raise UserError if a choice becomes only unknown tokens."""
    unknown = encoder.tokenizer.unk_token_id
    for choice, tokens in zip(example.choices, choices, strict=True):
        if unknown is not None and set(tokens) == {unknown}:
            raise UserError(
                f'{example}: the tokenizer does not know the choice "{choice}": it becomes '
                f"{encoder.tokenizer.unk_token}; change it or remove the row"
            )


def _check_told_apart(example: Example, choices: Sequence[object]) -> None:
    """Raise UserError if the right choice and a wrong choice have different texts but the same tokens."""
    right = choices[example.answer]
    for choice, tokens in zip(example.choices, choices, strict=True):
        if tokens == right and choice != example.choices[example.answer]:
            raise UserError(
                f'{example}: the choices "{example.choices[example.answer]}" and "{choice}" become the same tokens; '
                "change one of them or remove the row"
            )


def _check_length(example: Example, prompt: list[int], answer: int, encoder: Encoder, room: Room) -> None:
    used = min(len(prompt), encoder.max_tokens) + min(answer, encoder.max_tokens) - 1
    # Encoder-decoder models have relative positions: the number in their config is no limit.
    if room.positions is not None and used > room.positions and not encoder.encoder_decoder:
        raise UserError(
            f"{example}: prompt and answer take {used} tokens with data.max_tokens={encoder.max_tokens}, but the model "
            f"has {room.positions} positions; set data.max_tokens to at most {(room.positions + 1) // 2}"
        )


def _never_exceeds(encoder: Encoder, answer: int, room: Room) -> bool:
    return room.positions is None or encoder.max_tokens + answer - 1 <= room.positions


def _chunks(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), CHUNK):
        yield examples[start : start + CHUNK]
