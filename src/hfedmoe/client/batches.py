"""Batches of a client's own rows. Each round continues where the last one stopped."""

import math
from collections.abc import Iterator

import torch

from hfedmoe.client.history import ClientHistory
from hfedmoe.client.learner import Learner
from hfedmoe.data.encoding import IGNORED, Batch
from hfedmoe.data.example import Example
from hfedmoe.moe.routing.tokens import TokenMasks
from hfedmoe.seeds import generator


def endless_batches(learner: Learner, history: ClientHistory) -> Iterator[list[Example]]:
    """Batches without end, shuffled anew in each epoch; counts the rows in the history."""
    examples = learner.examples
    size, order, epoch = min(learner.train.batch_size, len(examples)), torch.empty(0), -1
    while True:
        rows = []
        for _ in range(size):
            now, place = divmod(history.examples_seen, len(examples))
            if now != epoch:
                draws = generator(learner.seed, "order", learner.number, now)
                epoch, order = now, torch.randperm(len(examples), generator=draws)
            rows.append(examples[int(order[place])])
            history.examples_seen += 1
        yield rows


def first_batches(learner: Learner, most: int | None = None) -> Iterator[list[Example]]:
    """The batches of a client's first pass: shuffled rows, at most `method.bootstrap_batches` batches, and `most`."""
    size = learner.train.batch_size
    draws = generator(learner.seed, "bootstrap", learner.number)
    order = torch.randperm(len(learner.examples), generator=draws).tolist()
    for start in range(0, num_first_batches(learner, most) * size, size):
        yield [learner.examples[i] for i in order[start : start + size]]


def num_first_batches(learner: Learner, most: int | None = None) -> int:
    """How many they are."""
    number = min(math.ceil(len(learner.examples) / learner.train.batch_size), learner.settings.bootstrap_batches)
    return number if most is None else min(number, most)


def tokens_of(batch: Batch) -> TokenMasks:
    """Which tokens of a batch are real."""
    if batch.decoder_input_ids is None:
        return TokenMasks(batch.attention_mask)
    return TokenMasks((batch.targets != IGNORED).long(), batch.attention_mask)
