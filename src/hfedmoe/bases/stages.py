"""Run some of a model's layers, so that what the lower ones give is computed once.

Hidden states enter as `inputs_embeds` and leave before the final norm: a stage's output is the next one's input. Texts
of a batch are padded at their ends, where the real tokens of a causal model do not look, so no mask is needed.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hfedmoe.files.disk import replacing
from hfedmoe.moe.compact import multiplies_16_bit

BATCH = 16
"""Texts in a pass."""


@contextmanager
def only(model: Any, layers: range, norm: bool = False) -> Iterator[Any]:
    """The decoder of a causal model with some of its layers; `norm`: with the final norm."""
    decoder = model.model
    every, final = decoder.layers, decoder.norm
    decoder.layers = nn.ModuleList([every[number] for number in layers])
    if not norm:
        decoder.norm = nn.Identity()
    try:
        yield decoder
    finally:
        decoder.layers, decoder.norm = every, final


def through(decoder: Any, **inputs: Tensor) -> Tensor:
    """Hidden states [B, S, H] after the layers of a decoder, of `input_ids` or `inputs_embeds`."""
    found: Tensor = decoder(use_cache=False, **inputs).last_hidden_state
    return found


def stacked(rows: Sequence[Tensor]) -> Tensor:
    """Texts of different lengths [S] or [S, H] as one batch."""
    return pad_sequence(list(rows), batch_first=True)


def batches(rows: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The texts, `BATCH` at a time."""
    for start in range(0, len(rows), BATCH):
        yield list(rows[start : start + BATCH])


def cut(hidden: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    """The hidden states of each text without its padding."""
    return [text[: len(row)].clone() for text, row in zip(hidden, rows, strict=True)]


def fast(device: torch.device) -> AbstractContextManager[Any]:
    """Products in bfloat16 where the device has them: what is computed so is only learned from."""
    here = multiplies_16_bit(device, torch.bfloat16)
    return torch.autocast(device.type, torch.bfloat16) if here else nullcontext()


@torch.no_grad()
def kept(model: Any, below: int, rows: Sequence[Tensor], file: Path) -> list[Tensor]:
    """Hidden states [S, H], bfloat16, of texts after the layers below one; computed unless `file` has them."""
    from safetensors.torch import load_file, save

    if not file.is_file():
        found: list[Tensor] = []
        with only(model, range(below)) as decoder:
            for texts in batches(rows):
                found += cut(through(decoder, input_ids=stacked(texts).to(model.device)).bfloat16().cpu(), texts)
        with replacing(file) as stream:
            stream.write(save({"hidden": torch.cat(found)}))
    return list(load_file(file)["hidden"].split([len(row) for row in rows]))
