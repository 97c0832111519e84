"""A checkpoint that is never written: random tensors, made on the device when a client reads them.

A client of any size can so be opened in seconds, with the code that opens a real one. Only a config is on the disk.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfedmoe.config import ModelConfig
from hfedmoe.models.loaded import Loaded
from hfedmoe.moe.weights.shards import Shards, TensorEntry
from hfedmoe.moe.weights.skeleton import empty_model, fill

WORDS = ("grain", "trade", "oil", "ship", "bank", "money", "rate", "share", "year", "profit", "loss", "crude", "wheat")
_STD = 0.02


class RandomShards(Shards):
    """The tensors of `model` under its own names: matrices are normal, norms 1, other vectors 0."""

    def __init__(self, folder: Path, model: Any, dtype: torch.dtype, device: torch.device) -> None:
        self.folder, self._device = folder, device
        self.entries = {
            name: TensorEntry(folder, dtype, tuple(tensor.shape), 0, tensor.numel() * dtype.itemsize)
            for name, tensor in model.state_dict().items()
        }

    def read(self, name: str) -> Tensor:
        """A new random tensor on the device."""
        return self._new(name, self[name].shape)

    def read_row(self, name: str, row: int) -> Tensor:
        """A new random row on the device."""
        return self._new(name, self[name].shape[1:])

    def _new(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(shape, dtype=self[name].dtype, device=self._device)
        if len(shape) < 2:
            return tensor.fill_(1.0 if "norm" in name else 0.0)
        return tensor.normal_(0, _STD)


def write_config(family: str, config: dict[str, Any], folder: Path) -> None:
    """Write config.json of a model in bfloat16: all that the planner reads, too."""
    from transformers import CONFIG_MAPPING

    described = CONFIG_MAPPING[family](**config)
    described.dtype = torch.bfloat16
    folder.mkdir(parents=True, exist_ok=True)
    described.save_pretrained(folder)


def open_random(config: ModelConfig, device: torch.device) -> Loaded:
    """As `models.carved.open_model`, with random weights and a tokenizer of `WORDS`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, dtype = Path(config.name), getattr(torch, config.dtype)
    model = empty_model(AutoModelForCausalLM, AutoConfig.from_pretrained(folder), dtype)
    store = fill(model, RandomShards(folder, model, dtype, device), dtype, config.expert_dtype, device)
    return Loaded(model, word_tokenizer(), store)


def word_tokenizer() -> Any:
    """One token per word; unknown words and signs are one token each, too."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ("<pad>", "<unk>", "<eos>")
    words = {word: number for number, word in enumerate((*special, *WORDS, "News", "Topic", ":"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=special[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], unk_token=special[1], eos_token=special[2]
    )


def write_rows(file: Path, length: int, number: int = 64) -> None:
    """Rows for classification and for completion: prompts and completions of more than `length` tokens."""
    import random

    draw = random.Random(0)

    def text() -> str:
        # Rows have different words: similar rows would all be routed to the same few experts.
        return " ".join(draw.choices(draw.sample(WORDS, 5), k=length + 8))

    rows = [
        {"text": text(), "label": ("grain", "trade")[index % 2], "prompt": text(), "completion": text()}
        for index in range(number)
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
