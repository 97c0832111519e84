"""What the tokenizer makes of the rows: label words, lengths, how conversations are written."""

import random
from dataclasses import replace

from hfedmoe.config import RunConfig
from hfedmoe.errors import UserError
from hfedmoe.models.loaded import Loaded
from hfedmoe.prepare import encoder_of
from hfedmoe.server.evaluation import room_of
from hfedmoe.starting import sizes
from hfedmoe.starting.data_section import SHOWN
from hfedmoe.starting.draft import Draft
from hfedmoe.starting.tasks import Tasks
from hfedmoe.starting.words import words_for

SAMPLE = 1000
"""Rows whose tokens are counted."""
UNLIMITED = 1 << 20
CHAT_WAYS = (("data.chat_system", "merge"), ("data.chat", "plain"))
"""Settings with which a conversation may be written that the chat template refuses."""


def put_prompts(draft: Draft, tasks: Tasks, loaded: Loaded) -> list[str]:
    """Put `data.label_words`, `data.max_tokens` and `train.loss`; returns lines about them.

    Raises:
        UserError: a row is malformed, or no way is found to write its conversation.
    """
    told: list[str] = []
    task, _ = tasks.of(draft.config())
    if task.kind == "classification" and not draft.has("data.label_words"):
        words = words_for(task.labels, loaded.tokenizer, task.template)
        if words:
            draft.put(
                "data.label_words", words, "what the model says: these labels do not begin with tokens of their own"
            )
            pairs = ", ".join(f"{label} = {word}" for label, word in list(words.items())[:SHOWN])
            told.append(f"words:  {pairs} (the labels themselves do not begin with tokens of their own)")
    lengths, longest = _tokens(draft, tasks, loaded)
    positions = None if loaded.encoder_decoder else room_of(loaded.model, loaded.tokenizer).positions
    found = sizes.lengths_of(lengths, task.kind, longest, positions)
    draft.put("data.max_tokens", found.max_tokens, f"95 % of the rows have at most {found.most}; longer ones are cut")
    config = draft.config()
    told.append(
        f"tokens: half of the rows have at most {found.half}, 95 % at most {found.most}; data.max_tokens = "
        f"{config.data.max_tokens}"
    )
    if encoder_of(loaded, tasks.of(config)[0], config.data).first_token_only:
        draft.put("train.loss", "choices", "compare the labels with each other, not with all words")
    return told


def _tokens(draft: Draft, tasks: Tasks, loaded: Loaded) -> tuple[list[int], int]:
    """The longer one of prompt and answer of some rows, and the longest label or choice.

    Conversations that the chat template refuses are tried in other ways; the one that works is put.
    """
    try:
        return _counted(draft.config(), tasks, loaded)
    except UserError as error:
        if not any(example.messages for example in tasks.of(draft.config())[0].train[:1]):
            raise
        for key, value in CHAT_WAYS:
            if draft.has(key):
                continue
            draft.put(key, value, "the tokenizer's chat template cannot write these conversations as they are")
            try:
                return _counted(draft.config(), tasks, loaded)
            except UserError:
                draft.drop(key)
        raise error


def _counted(config: RunConfig, tasks: Tasks, loaded: Loaded) -> tuple[list[int], int]:
    task, _ = tasks.of(config)
    sample = random.Random(0).sample(task.train, min(SAMPLE, len(task.train)))
    unlimited = config.data.model_copy(update={"max_tokens": UNLIMITED})
    encoder = encoder_of(loaded, replace(task, train=sample), unlimited)
    tokens = [max(len(prompt), len(answer)) for prompt, answer in encoder.encoded(sample)]
    choices = [len(choice) for example in sample for choice in encoder.choices(example)]
    return tokens, max(choices, default=1)
