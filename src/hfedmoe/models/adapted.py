"""Load a PEFT adapter that `hfedmoe export` wrote, merged into its base."""

import json
import warnings
from pathlib import Path
from typing import Any

from hfedmoe.config import ModelConfig
from hfedmoe.errors import UserError
from hfedmoe.models.loaded import Loaded
from hfedmoe.models.loading import load
from hfedmoe.models.names import LOADING_ERRORS, first_line

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter and no whole model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(folder: Path) -> tuple[str, str | None]:
    """The base model of an adapter and its revision: the folder `base` in it, else what its config names.

    Raises:
        UserError: the config cannot be read or names no base, or the base is a path that does not exist here.
    """
    path = folder / CONFIG
    try:
        tree: Any = json.loads(path.read_text(encoding="utf-8"))
        name, revision = tree["base_model_name_or_path"], tree.get("revision")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: is damaged ({error}); export the run again") from None
    if (folder / BASE / "config.json").is_file():
        return str(folder / BASE), None
    if not isinstance(name, str) or not name:
        raise UserError(f"{path}: names no base model; set base_model_name_or_path")
    if Path(name).is_absolute() and not Path(name).exists():
        raise UserError(f"{path}: its base model {name} is not here; set base_model_name_or_path to where it is")
    return name, revision


def load_adapted(config: ModelConfig, seed: int) -> Loaded:
    """The base of an adapter with the adapter merged into it.

    Args:
        config: its name is the adapter's folder.

    Raises:
        UserError: the adapter is damaged or does not fit its base, or the base cannot be loaded.
    """
    from peft import PeftModel

    folder = Path(config.name).expanduser()
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder}: has no {WEIGHTS}; export the run again")
    name, revision = base_of(folder)
    loaded = load(config.model_copy(update={"name": name, "revision": revision}), seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about experts, whose parameters are meant
            adapted: Any = PeftModel.from_pretrained(loaded.model, str(folder))
            loaded.model = adapted.merge_and_unload()
    except LOADING_ERRORS as error:
        raise UserError(f"{folder}: does not fit its base {name} ({first_line(error)}); export the run again") from None
    return loaded
