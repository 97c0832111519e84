"""Checkpoints with random weights, of any family and size, written layer by layer in the layout of the hub.

    python -m benchmarks.checkpoints FOLDER      # 6.9 B parameters in the shape of OLMoE-1B-7B, 14 GB

They need as much memory and time as the models on the hub, so no download is needed to measure either. The tokenizer is
that of the packaged SmolLM2.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, OlmoeConfig
from transformers.core_model_loading import revert_weight_conversion

from hfedmoe.models.packaged import smollm2_folder


def olmoe_1b_7b() -> OlmoeConfig:
    """The shape of allenai/OLMoE-1B-7B: 16 layers of 64 experts, top-8."""
    return OlmoeConfig(
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=64,
        num_experts_per_tok=8,
        tie_word_embeddings=False,
    )


def half_gigabyte() -> OlmoeConfig:
    """A small OLMoE: 4 layers of 16 experts, top-2, 0.5 GB in float32."""
    return OlmoeConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=9,
        num_key_value_heads=9,
        num_experts=16,
        num_experts_per_tok=2,
    )


def write(config: Any, folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0, std: float = 0.02) -> int:
    """Write a random model that `config` describes, one file per layer; returns its bytes.

    Matrices are normal with standard deviation `std`, norms are 1, other vectors 0. One layer is in memory at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with init_empty_weights():
        model = auto.from_config(config, dtype=dtype)
    model.tie_weights()
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2_folder()).save_pretrained(folder)
    groups = list(_groups(model))
    places: dict[str, str] = {}
    size = 0
    generator = torch.Generator().manual_seed(seed)
    for number, names in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        made = {name: _random(name, like, dtype, std, generator) for name, like in names.items()}
        tensors = {name: tensor.contiguous() for name, tensor in revert_weight_conversion(model, made).items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index) + "\n", encoding="utf-8")
    return size


def _groups(model: Any) -> Iterator[dict[str, Tensor]]:
    """Parameters and stored buffers by layer; those outside the layers are one group."""
    groups: dict[str, dict[str, Tensor]] = {}
    tensors = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in model.state_dict()}
    for name, tensor in tensors.items():
        parts = name.split(".")
        layer = next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()), "")
        groups.setdefault(layer, {})[name] = tensor
    yield from groups.values()


def _random(name: str, like: Tensor, dtype: torch.dtype, std: float, generator: torch.Generator) -> Tensor:
    if like.dim() < 2:
        return torch.ones(like.shape, dtype=dtype) if "norm" in name else torch.zeros(like.shape, dtype=dtype)
    return torch.empty(like.shape, dtype=dtype).normal_(0, std, generator=generator)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path)
    print(f"{write(olmoe_1b_7b(), arguments.parse_args().folder) / 1e9:.1f} GB")
