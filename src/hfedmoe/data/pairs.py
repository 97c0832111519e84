"""Tokenise prompts and answers as EleutherAI's lm-evaluation-harness does (version 0.4, HF models)."""

from collections.abc import Sequence
from typing import Any

from hfedmoe.errors import UserError


def encode_pairs(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], encoder_decoder: bool = False
) -> list[tuple[list[int], list[int]]]:
    """The tokens of every (context, continuation).

    White space at the end of a context moves to its continuation. For causal models both are tokenised as one text,
    and the tokens beyond the length of the context alone are the continuation. For encoder-decoder models they are
    tokenised separately. The tokenizer adds its special tokens, unless the text begins with the first of them.
    """
    moved = []
    for context, continuation in pairs:
        kept = context.rstrip()
        moved.append((kept, context[len(kept) :] + continuation))
    contexts = _encode(tokenizer, [context for context, _ in moved])
    if not encoder_decoder:
        contexts = _without_end(tokenizer, contexts)
    else:
        continuations = _plain(tokenizer, [continuation for _, continuation in moved])
        return list(zip(contexts, continuations, strict=True))
    wholes = _without_end(tokenizer, _encode(tokenizer, [context + continuation for context, continuation in moved]))
    return [(context, whole[len(context) :]) for context, whole in zip(contexts, wholes, strict=True)]


def fit(
    prompt: list[int], answer: list[int], longest: int, encoder_decoder: bool, name: str
) -> tuple[list[int], list[int]]:
    """Cut the beginning of the prompt, so that the model's input has at most `longest` tokens.

    Raises:
        UserError: the answer has no tokens, or more than `longest`; `name` names the example.
    """
    if not answer:
        raise UserError(f"{name}: a choice adds no tokens to its prompt; change it or remove the row")
    if len(answer) > longest:
        raise UserError(
            f"{name}: a choice has {len(answer)} tokens, but the model takes {longest}; shorten it or remove the row"
        )
    # The last token of the answer is only predicted; it is not an input.
    room = longest if encoder_decoder else longest + 1 - len(answer)
    return prompt[-room:], answer


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer adds before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return dressed[:start], dressed[start + len(bare) :]
    return [], []


def _without_end(tokenizer: Any, texts: list[list[int]]) -> list[list[int]]:
    """Tokens without the special tokens that the tokenizer adds after a text.

    Decision: this differs from the harness, where end-of-sequence is the last token of every choice, and the only
    token of a short one.
    """
    _, end = special_tokens(tokenizer)
    return [tokens[: -len(end)] if end and tokens[-len(end) :] == end else tokens for tokens in texts]


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    mark = None if first is None else tokenizer.decode(first)
    dressed: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"]
    return [
        _plain(tokenizer, [text])[0] if mark is not None and text.startswith(mark) else tokens
        for text, tokens in zip(texts, dressed, strict=True)
    ]


def _plain(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    tokens: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return tokens
