"""Write a model from `moe.upcycle` as a Mixtral checkpoint in the hub's layout, which any transformers version reads.

Its equal experts share memory. A copy of the whole model may not fit into memory even if the dense model does, so
layers are copied and written one by one.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from hfedmoe.config import ModelConfig, UpcycleConfig
from hfedmoe.errors import UserError
from hfedmoe.export.merged import say_whether_tied
from hfedmoe.files.whole import writing, written_whole
from hfedmoe.models.loading import load

DTYPES = get_args(ModelConfig.model_fields["dtype"].annotation)


def upcycle_to_folder(dense: str, out: Path, experts: int, top_k: int, dtype: str, seed: int) -> None:
    """Load a dense model by name and write its upcycled form with the tokenizer to `out`.

    Raises:
        UserError: bad options, the model cannot be loaded or upcycled, or `out` is not empty or cannot be written.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: expected {', '.join(DTYPES)}")
    if top_k > experts:
        raise UserError(f"--top-k {top_k} is more than --experts {experts}")
    # No **: mypy cannot follow it into the Literal of dtype.
    settings = ModelConfig.model_validate(
        {"name": dense, "dtype": dtype, "device": "cpu", "upcycle": UpcycleConfig(experts=experts, top_k=top_k)}
    )
    with written_whole(out) as scratch:
        loaded = load(settings, seed)
        with writing(out):
            write_mixtral(loaded.model, scratch)
            loaded.tokenizer.save_pretrained(scratch)


def write_mixtral(model: Any, folder: Path) -> None:
    """Write a Mixtral model, one safetensors file per layer; experts that share memory are written separately."""
    from safetensors.torch import save_file

    say_whether_tied(model)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    files = list(_files(model))
    places: dict[str, str] = {}
    size = 0
    for number, names in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {hub: tensor.clone() for name in names for hub, tensor in _hub_tensors(model, name)}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _files(model: Any) -> Iterator[list[str]]:
    """The names of the parameters in each file: one file for those outside the layers, and one per layer.

    A tied head is the same tensor as the embedding, so it is not listed.
    """
    groups: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        layer = name.split(".")[2] if name.startswith("model.layers.") else ""
        groups.setdefault(layer, []).append(name)
    yield from groups.values()


def _hub_tensors(model: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The hub's names and tensors of a parameter: experts one by one, w1 gate, w2 down, w3 up."""
    tensor = model.get_parameter(name).detach()
    block, _, leaf = name.replace(".mlp.", ".block_sparse_moe.").partition(".experts.")
    for expert, row in enumerate(tensor) if leaf else ():
        if leaf == "down_proj":
            yield f"{block}.experts.{expert}.w2.weight", row
        else:
            gate, up = row.chunk(2)
            yield f"{block}.experts.{expert}.w1.weight", gate
            yield f"{block}.experts.{expert}.w3.weight", up
    if not leaf:
        yield block, tensor
