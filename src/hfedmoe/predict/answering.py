"""Ask the trained model of a run or an export: the probabilities of the labels of a text, or what it writes."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hfedmoe.config import RunConfig, load_config
from hfedmoe.config.data import Kind
from hfedmoe.data.chat import plain_prompt, render
from hfedmoe.data.encoding import Encoder
from hfedmoe.data.example import Example
from hfedmoe.data.kinds import settled_kind
from hfedmoe.data.known import known_set
from hfedmoe.data.labels import label_words
from hfedmoe.data.task import Task
from hfedmoe.data.tasks import labels_of_run
from hfedmoe.data.templates import template_of
from hfedmoe.errors import UserError
from hfedmoe.export.in_memory import trained_model
from hfedmoe.export.task_file import read_task
from hfedmoe.models.adapted import is_adapter, load_adapted
from hfedmoe.models.loaded import Loaded
from hfedmoe.models.loading import load
from hfedmoe.prepare import encoder_of
from hfedmoe.server.evaluation import evaluate, longest_input
from hfedmoe.server.prior import probabilities

Message = tuple[str, str]
"""Role and text."""
PLACEHOLDER = "ok"
"""Stands where the answer will be, because prompts are written as those of training are, which have one."""


@dataclass
class Answerer:
    """A trained model that can be asked."""

    config: RunConfig
    loaded: Loaded
    encoder: Encoder
    labels: tuple[str, ...]
    """Empty: the task has none, and the model writes its answer."""
    words: tuple[str, ...]
    """What the model says for each label."""
    talks: bool
    """Whether it was trained on conversations."""

    def label_shares(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """The probability of every label for each text, the most probable label first.

        They are those of `hfedmoe predict` for the same text.

        Raises:
            UserError: the task has no labels, or a text is empty.
        """
        if not self.labels:
            raise UserError("the task of this run has no labels; its model writes answers (`hfedmoe chat`)")
        if not all(text.strip() for text in texts):
            raise UserError("a text is empty; leave it out")
        if not texts:
            return []
        examples = [Example(text.strip(), self.words, 0) for text in texts]
        own = self.config.evaluation
        scores = evaluate(self.loaded.model, examples, self.encoder, own.batch_size, own.scoring).scores
        assert scores is not None
        shares = [dict(zip(self.labels, probabilities(row), strict=True)) for row in scores]
        return [dict(sorted(row.items(), key=lambda entry: -entry[1])) for row in shares]

    def answer(self, messages: Sequence[Message], most_tokens: int, say: Callable[[str], None]) -> str:
        """What the model writes after a conversation that ends with a user's message, word by word to `say`.

        A model that was not trained on conversations gets only the last message, as a prompt. It always takes the most
        probable token.

        Raises:
            UserError: the chat template refuses the conversation.
        """
        asked, ends = self._asked(messages)
        model: Any = self.loaded.model
        room = longest_input(model, self.loaded.tokenizer)
        prompt = self.encoder.without_limit().prompts([asked])[0][-max(1, room - most_tokens) :]
        tokens = torch.tensor([prompt], device=next(model.parameters()).device)
        pieces: list[str] = []

        def both(piece: str) -> None:
            pieces.append(piece)
            say(piece)

        logging.getLogger("transformers.generation").setLevel(logging.ERROR)  # on settings that greedy search ignores
        with torch.no_grad():
            model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=most_tokens,
                do_sample=False,
                eos_token_id=sorted(ends) or None,
                pad_token_id=self.encoder.pad_token_id,
                streamer=_streamer(self.loaded.tokenizer, both, ends, self.loaded.encoder_decoder),
            )
        return "".join(pieces).strip()

    def _asked(self, messages: Sequence[Message]) -> tuple[Example, set[int]]:
        """The example whose prompt is asked, and the tokens that end an answer."""
        tokenizer = self.loaded.tokenizer
        ends = {tokenizer.eos_token_id} - {None}
        text = messages[-1][1]
        if not self.talks:
            return Example(text, completion=PLACEHOLDER), ends
        if self.config.data.chat == "plain":
            return Example(plain_prompt(messages), completion=PLACEHOLDER), ends
        asked = Example(text, completion=PLACEHOLDER, messages=(*messages, ("assistant", PLACEHOLDER)))
        _, answer = render(tokenizer, asked, self.encoder.chat)
        behind = tokenizer(answer.partition(PLACEHOLDER)[2].strip(), add_special_tokens=False)["input_ids"]
        return asked, ends | set(behind[:1])


def open_answerer(target: Path, checkpoint: str = "best", overrides: list[str] | None = None) -> Answerer:
    """Load the model of a run's checkpoint, or of an export.

    Args:
        overrides: `--set` of settings that say where the model runs.

    Raises:
        UserError: neither a run folder nor an export, no such checkpoint, or the model cannot be loaded.
    """
    of_run = (target / "config.toml").is_file()
    config = load_config(target / "config.toml", overrides) if of_run else read_task(target, overrides)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    known = known_set(config.data)
    kind = settled_kind(config.data)
    labels = () if kind in ("choices", "completion") else labels_of_run(config.data, config.partition, config.seed)
    words = (
        () if not labels else label_words(labels, config.data) if known is None else known.wording(config.data).words
    )
    if of_run:
        loaded = trained_model(target, checkpoint, config.model.device)
    else:
        adapter = is_adapter(target)
        loaded = load_adapted(config.model, config.seed) if adapter else load(config.model, config.seed)
        loaded.model.eval()
    first = [Example("", words, 0)] if labels else []
    shown: Kind = "classification" if labels else "completion"
    task = Task(str(target), shown, template_of(config.data, known, kind), labels, [], first)
    encoder = encoder_of(loaded, task, config.data)
    talks = known is not None and known.name == "instructions"
    return Answerer(config, loaded, encoder, labels, words, talks)


def _streamer(tokenizer: Any, say: Callable[[str], None], ends: set[int], encoder_decoder: bool) -> Any:
    """Gives whole words to `say` while they are generated, without the tokens that end an answer."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def put(self, value: Any) -> None:
            is_prompt = self.skip_prompt and self.next_tokens_are_prompt
            if is_prompt or int(value) not in ends:
                super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            say(text)

    return Streamer(tokenizer, skip_prompt=not encoder_decoder, skip_special_tokens=True)
