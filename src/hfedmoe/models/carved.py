"""Open a model with its experts left on disk, so that a device loads only as many as fit into its memory."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfedmoe.config import ModelConfig
from hfedmoe.errors import UserError
from hfedmoe.files.lfs import pointer_in
from hfedmoe.models import domains
from hfedmoe.models.loaded import Loaded, device_of, with_padding
from hfedmoe.models.names import (
    LOADED_WHOLE,
    LOADING_ERRORS,
    PACKAGED_MODELS,
    explain,
    locate,
    refuse_adapter,
    source_of,
)
from hfedmoe.models.packaged import gguf_file, smollm2_folder
from hfedmoe.moe.anatomy import UnsupportedModelError, find_moe_layers
from hfedmoe.moe.experts.state import ExpertState
from hfedmoe.moe.experts.store import ExpertStore
from hfedmoe.moe.weights.shards import CheckpointError, Shards, check_precisions, files_of, weights_file
from hfedmoe.moe.weights.skeleton import empty_model, fill

_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def checkpoint_folder(config: ModelConfig) -> Path | None:
    """The folder with the model's safetensors checkpoint, downloaded if it is on the hub; None: it has none.

    None for upcycled models (`hfedmoe upcycle` writes a checkpoint), GGUF files, `smollm2`, `tiny` and quantised
    checkpoints.

    Raises:
        UserError: the model cannot be found or reached.
    """
    if config.upcycle is not None or config.name in LOADED_WHOLE:
        return None
    from transformers import AutoConfig

    source, options = source_of(config)
    if "gguf_file" in options:
        return None
    try:
        described = AutoConfig.from_pretrained(source, **options)
        if getattr(described, "quantization_config", None) is not None:
            return None  # the same check as in `quantisation_of`, without reading the config again
    except LOADING_ERRORS as error:
        raise UserError(explain(config, error)) from None
    folder = snapshot(config, [*_FILES, "*.py"] if config.trust_remote_code else _FILES)
    refuse_adapter(config, folder)
    return None if weights_file(folder) is None else folder


def snapshot(config: ModelConfig, wanted: list[str]) -> Path:
    """The folder of a model; of one on the hub, the files that match `wanted` are downloaded.

    Raises:
        UserError: the model cannot be found or reached.
    """
    from huggingface_hub import snapshot_download

    source, _ = source_of(config)
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(
            snapshot_download(
                source, revision=config.revision, allow_patterns=wanted, ignore_patterns=["consolidated*", "*/*"]
            )
        )
    except LOADING_ERRORS as error:
        raise UserError(explain(config, error)) from None


def weight_files(config: ModelConfig) -> list[Path]:
    """The files with the weights that transformers loads: safetensors, `pytorch_model*.bin` or GGUF; at least one.

    Of packaged models, the files that they are made from: what is made may differ in the last bits between machines.

    Raises:
        UserError: the model cannot be found or reached.
        CheckpointError: it has no weights, or a file is missing.
    """
    if config.name in PACKAGED_MODELS:
        dense = gguf_file() or smollm2_folder()  # without the package, the second one says so
        return [dense, domains.SHIPPED] if config.name == domains.NAME else [dense]
    source, options = source_of(config)
    if "gguf_file" in options:
        return [Path(source) / options["gguf_file"]]
    folder = snapshot(config, ["*.safetensors", "*.json"])
    file = weights_file(folder)
    if file is None:
        folder = snapshot(config, ["pytorch_model*.bin", "*.json"])
        file = next((folder / name for name in _PICKLED if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder}: has no weights: neither safetensors nor {_PICKLED[0]}")
    files = files_of(file)
    for part in files:
        if not part.is_file():
            raise CheckpointError(f"{part}: no such file, though the checkpoint's index names it")
        if (pointer := pointer_in(part)) is not None:
            raise CheckpointError(pointer)
    return files


def check_stored(config: ModelConfig) -> None:
    """Raise UserError if a local folder has tensors that cannot be read, such as FP8 ones without their config.

    transformers would load them as numbers without their scales.

    Args:
        config: of a model that is not quantised, by its config.json.
    """
    if config.name in PACKAGED_MODELS:
        return
    source, options = locate(config)
    try:
        if not options and Path(source).is_dir():
            check_precisions(Path(source))
    except CheckpointError as error:
        raise UserError(f"model.name = {config.name}: {error}") from None


def quantisation_of(config: ModelConfig) -> str | None:
    """The method by which a model's checkpoint is quantised, from its config; None: not quantised, packaged or GGUF.

    Raises:
        UserError: the model cannot be found or reached.
    """
    from transformers import AutoConfig

    if config.name in PACKAGED_MODELS:
        return None
    source, options = source_of(config)
    if "gguf_file" in options:
        return None
    try:
        described = AutoConfig.from_pretrained(source, **options)
    except LOADING_ERRORS as error:
        raise UserError(explain(config, error)) from None
    found = getattr(described, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method) or "by an unnamed method")


def open_model(config: ModelConfig, folder: Path) -> Loaded:
    """Load a model without its experts from a checkpoint folder; `Loaded.store` reads experts on demand.

    Memory holds the loaded part and at most one more tensor.

    Raises:
        UserError: the checkpoint is damaged or cannot be carved.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    dtype: torch.dtype = getattr(torch, config.dtype)
    device = device_of(config.device)
    try:
        described = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        auto = AutoModelForSeq2SeqLM if described.is_encoder_decoder else AutoModelForCausalLM
        model = empty_model(auto, described, dtype, trust_remote_code=config.trust_remote_code)
        store = fill(model, Shards(folder), dtype, config.expert_dtype, device)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (UnsupportedModelError, CheckpointError) as error:
        raise UserError(f"model.name = {config.name}: {error}") from None
    except LOADING_ERRORS as error:
        raise UserError(explain(config, error)) from None
    return Loaded(model, with_padding(tokenizer), store)


def store_experts(model: Any, config: ModelConfig) -> ExpertStore:
    """Move the experts of a loaded model into a store, with the precision `model.expert_dtype`.

    Raises:
        UserError: the model has no supported MoE layers.
    """
    try:
        states = [ExpertState(layer) for layer in find_moe_layers(model)]
        for state in states:
            state.math()
    except UnsupportedModelError as error:
        raise UserError(f"model.name = {config.name}: {error}") from None
    parameters = list(model.parameters())
    source = _ModelExperts(states)
    store = ExpertStore(
        source,
        [state.layer.num_experts for state in states],
        config.expert_dtype,
        getattr(torch, config.dtype),
        parameters[0].device,
    )
    store.reside([torch.ones(state.layer.num_experts, dtype=torch.bool) for state in states])
    source.release()
    for state in states:
        state.layer.experts.to("meta")
    return store


class _ModelExperts:
    """The experts of a loaded model until `release`: an `ExpertSource`."""

    def __init__(self, states: list[ExpertState]) -> None:
        self._tensors = [state.tensors() for state in states]
        self._shapes = [{name: tuple(stack.shape[1:]) for name, stack in stacks.items()} for stacks in self._tensors]

    def shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        return self._shapes[layer]

    def read(self, layer: int, expert: int) -> dict[str, Tensor]:
        return {name: stack[expert] for name, stack in self._tensors[layer].items()}

    def release(self) -> None:
        """Drop the tensors; after this, nothing can be read."""
        self._tensors = []
