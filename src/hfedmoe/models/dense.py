"""Refuse a model without experts by its description, before rows are read or weights are loaded."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfedmoe.config import ModelConfig
from hfedmoe.errors import UserError
from hfedmoe.models.names import PACKAGED_MODELS, locate
from hfedmoe.moe.families import DENSE, why_dense


def refuse_dense(config: ModelConfig) -> None:
    """Raise UserError if the model is surely dense and is not upcycled. Needs neither torch nor transformers.

    Only what is on this machine is read: `config.json` of a folder. A hub model is told by `refuse_without_experts`.
    """
    if config.upcycle is None and (family := _family_of(config)) in DENSE:
        raise UserError(f"model.name = {config.name}: {why_dense(family)}")


def refuse_without_experts(name: str, described: Any) -> None:
    """Raise UserError if the transformers config of a model speaks of no experts.

    The config of every MoE family counts them (a test looks at all). What code of the checkpoint's own builds is not
    known before it has run.
    """
    if not getattr(described, "auto_map", None) and not _counts_experts(described.to_dict()):
        raise UserError(f"model.name = {name}: {why_dense(described.model_type)}")


def _family_of(config: ModelConfig) -> str:
    """The model type, if a file on this machine says it and the model brings no code of its own; else empty."""
    if config.name == "smollm2":
        return "llama"
    if config.name in PACKAGED_MODELS or not Path(config.name).expanduser().is_dir():
        return ""
    folder, _ = locate(config)
    try:
        described = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # transformers says what is wrong with it
        return ""
    plain = isinstance(described, dict) and "auto_map" not in described
    return str(described.get("model_type", "")) if plain else ""


def _counts_experts(tree: Mapping[str, Any]) -> bool:
    inner = (value for value in tree.values() if isinstance(value, Mapping))
    return any("expert" in str(key) for key in tree) or any(map(_counts_experts, inner))
