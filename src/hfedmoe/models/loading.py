"""Load a model and its tokenizer by name: packaged, local folder, GGUF file or hub id."""

import logging
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hfedmoe.config import ModelConfig
from hfedmoe.errors import UserError
from hfedmoe.models.carved import check_stored, checkpoint_folder, open_model, store_experts
from hfedmoe.models.dense import refuse_without_experts
from hfedmoe.models.loaded import Loaded, device_of, with_padding
from hfedmoe.models.names import LOADING_ERRORS, PACKAGED_MODELS, explain, source_of
from hfedmoe.moe.anatomy import UnsupportedModelError, find_moe_layers
from hfedmoe.moe.families import UNSUPPORTED
from hfedmoe.moe.head import keep_head_one_product
from hfedmoe.moe.weights.checkpoint import CheckpointExperts, StoredModel
from hfedmoe.moe.weights.shards import CheckpointError, Shards, weights_file
from hfedmoe.moe.weights.skeleton import missing_tensors


def load(config: ModelConfig, seed: int, carve: bool = False) -> Loaded:
    """Load the model that the configuration names, upcycle it if configured, and move it to its device.

    Args:
        seed: for new weights: upcycled routers, the tiny model.
        carve: leave experts on disk until they are needed, if there is a checkpoint to read them from.

    Raises:
        UserError: the model is unknown, unreachable, damaged, or cannot be upcycled.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if carve or config.expert_dtype != "same":
        if config.upcycle is None and config.name not in PACKAGED_MODELS:
            _described(config)  # refuse unsupported models before their weights are downloaded
        folder = checkpoint_folder(config)
        if folder is not None:
            return open_model(config, folder)
    loaded = _whole(config, seed)
    keep_head_one_product(loaded.model)
    if config.expert_dtype != "same":
        loaded.store = store_experts(loaded.model, config)
    return loaded


def require_experts(config: ModelConfig) -> None:
    """Look only at a model's config, before rows are read: is it one that can be used, with experts?

    Not of GGUF files: to read what describes one takes seconds.

    Raises:
        UserError: the model is unknown, unreachable or unsupported, or dense and not upcycled.
    """
    if config.upcycle is None and config.name not in PACKAGED_MODELS and not config.name.endswith(".gguf"):
        described, _ = _described(config)
        refuse_without_experts(config.name, described)


def _whole(config: ModelConfig, seed: int) -> Loaded:
    loaded = _tiny(seed, config.dtype) if config.name == "tiny" else _pretrained(config)
    device = device_of(config.device)
    if config.upcycle is not None:
        # Move first, so that the experts still share one tensor on the device.
        loaded.model = _upcycled(loaded.model.to(device), config, seed)
        return loaded
    # The dtype was set while loading: casting the whole model would also cast rotary tables and correction biases.
    loaded.model = loaded.model.to(device)
    return loaded


def structure(config: ModelConfig) -> Any:
    """The model without weights (on the meta device), built from its config only, and upcycled if configured.

    Its tensors have the dtype of the checkpoint, not `model.dtype`.

    Raises:
        UserError: the model is unknown or unreachable, transformers cannot build it, or it cannot be upcycled.
    """
    import torch

    if config.name == "tiny":
        model = _tiny(seed=0).model.to("meta")
    else:
        described, auto = _described(config)
        try:
            with torch.device("meta"):
                model = auto.from_config(
                    described, dtype=described.dtype or torch.float32, trust_remote_code=config.trust_remote_code
                )
        except LOADING_ERRORS as error:
            raise UserError(explain(config, error)) from None
    model.tie_weights()  # moving to the meta device separates tied tensors
    return model if config.upcycle is None else _upcycled(model, config, seed=0)


def tokenizer_of(config: ModelConfig) -> Any:
    """The tokenizer of a model, without its weights. Raises UserError if it is unknown, unreachable or damaged."""
    if config.name == "tiny":
        from hfedmoe.models.tiny import tiny_tokenizer

        return tiny_tokenizer()
    from transformers import AutoTokenizer

    source, options = source_of(config)
    try:
        return with_padding(AutoTokenizer.from_pretrained(source, **options))
    except LOADING_ERRORS as error:
        raise UserError(explain(config, error)) from None


def _upcycled(dense: Any, config: ModelConfig, seed: int) -> Any:
    from hfedmoe.moe.upcycle import upcycle

    settings = config.upcycle
    assert settings is not None
    try:
        return upcycle(dense, settings.experts, settings.top_k, settings.router_std, seed)
    except ValueError as error:
        raise UserError(f"model.name = {config.name}: {error}") from None


def _tiny(seed: int, dtype: str = "float32") -> Loaded:
    import torch

    from hfedmoe.models.tiny import tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    model = tiny_model(len(tokenizer), seed)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return Loaded(model, tokenizer)


def _pretrained(config: ModelConfig) -> Loaded:
    import torch
    from transformers import AutoTokenizer

    described, auto = _described(config)
    source, options = source_of(config)
    report: list[str] = []
    if getattr(described, "quantization_config", None) is None:
        check_stored(config)
    try:
        with _load_report(part=described.get_text_config().model_type != described.model_type) as report:
            model, found = auto.from_pretrained(
                source, dtype=getattr(torch, config.dtype), output_loading_info=True, **options
            )
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except LOADING_ERRORS as error:
        what = _what_does_not_fit(config, Path(source)) or _first_problem(config, report) or explain(config, error)
        raise UserError(what) from None
    if getattr(model, "_hf_peft_config_loaded", False):  # of a hub model; locate refuses it in a folder
        raise UserError(
            f"model.name = {config.name}: the model has a PEFT adapter beside it, which transformers adds to it; "
            "give a checkpoint with the adapter merged in"
        )
    if found["missing_keys"]:
        raise UserError(f"model.name = {missing_tensors(config.name, list(found['missing_keys']))}")
    return Loaded(model, with_padding(tokenizer))


def _what_does_not_fit(config: ModelConfig, folder: Path) -> str | None:
    """One line about a tensor that does not fit the config (transformers does not name it); None: all fit."""
    try:
        if not folder.is_dir() or weights_file(folder) is None:
            return None
        model = structure(config.model_copy(update={"upcycle": None}))
        checkpoint = StoredModel(Shards(folder), model)
        missing = CheckpointExperts(checkpoint, find_moe_layers(model)).missing()
    except (CheckpointError, UnsupportedModelError, UserError):
        return None
    if missing:
        return f"model.name = {missing_tensors(config.name, missing)}"
    for name, like in model.state_dict().items():
        source = checkpoint.sources.get(name)
        stored = None if source is None or source.converter is not None else checkpoint.shards[source.first].shape
        if stored is not None and tuple(stored) != tuple(like.shape):
            return (
                f"model.name = {config.name}: {name} has the shape {list(stored)}, but config.json says "
                f"{list(like.shape)}; download or convert the checkpoint again"
            )
    return None


def _described(config: ModelConfig) -> tuple[Any, Any]:
    """The transformers config of a model (not of `tiny`), and the auto class that loads it.

    Raises:
        UserError: the config cannot be read, the family is unsupported, or transformers has no language model for it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    source, options = source_of(config)
    try:
        described = AutoConfig.from_pretrained(source, **options)
    except LOADING_ERRORS as error:
        raise UserError(explain(config, error)) from None
    family = described.model_type
    if family in UNSUPPORTED:
        raise UserError(f"model.name = {config.name}: {family}: {UNSUPPORTED[family]}")
    auto: Any = AutoModelForSeq2SeqLM if described.is_encoder_decoder else AutoModelForCausalLM
    own_code = auto.__name__ in (getattr(described, "auto_map", None) or {})
    if type(described) not in auto._model_mapping and not own_code:
        raise UserError(
            f"model.name = {config.name}: transformers has no language model of type {family} ({auto.__name__} does "
            "not know it); give a causal or sequence-to-sequence language model, see docs/models.md"
        )
    return described, auto


@contextmanager
def _load_report(part: bool) -> Iterator[list[str]]:
    """Collect transformers' reports about tensors that do not fit, instead of printing their tens of lines.

    Such a model is refused in one line. A list of tensors that are only unused is printed, unless `part`: of a
    multimodal model, only the text model is loaded, so the other tensors are unused on purpose.
    """
    reports: list[str] = []
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    shown = logger.getEffectiveLevel()

    def worth_reading(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "LOAD REPORT" in text:
            reports.append(text)
            if part or any(status in text for status in ("MISSING", "MISMATCH", "CONVERSION")):
                return False
        return record.levelno >= shown

    logger.addFilter(worth_reading)
    if shown > logging.WARNING:  # the report is needed all the same
        logger.setLevel(logging.WARNING - 1)  # at WARNING itself transformers would say more, about parallel models
    try:
        yield reports
    finally:
        logger.removeFilter(worth_reading)
        logger.setLevel(level)


def _first_problem(config: ModelConfig, reports: list[str]) -> str | None:
    """One line about the first tensor in transformers' reports that cannot be used; None: they have none."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(reports))
    row = re.search(r"^(\S.*?) +\| (MISMATCH|CONVERSION) +\|(.*)$", text, re.MULTILINE)
    if row is None:
        return None
    # Layers with the same problem are one row: "layers.{0, 1, 2}.x".
    name, status, details = re.sub(r"\{(\d+)[^}]*\}", r"\1", row[1]), row[2], row[3].strip()
    if status == "CONVERSION":
        # A traceback, the error's own text, and a line that begins with "Error".
        lines = [line.strip() for line in text[row.end() :].split("\nNotes:")[0].splitlines()]
        end = next((i for i, line in enumerate(lines) if line.startswith("Error")), len(lines))
        details = next((line for line in reversed(lines[:end]) if line), "")
    shapes = re.search(r"ckpt: (?:torch\.Size\()?(.*?)\)? vs model: ?(?:torch\.Size\()?(.*?)\)?$", details)
    if shapes is not None:
        details = f"it has the shape {shapes[1]}, but config.json says {shapes[2]}"
    why = f" ({textwrap.shorten(details, 160, placeholder=' ...')})" if details else ""
    return f"model.name = {config.name}: {name} cannot be used{why}; download or convert the checkpoint again"
