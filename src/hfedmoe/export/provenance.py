"""Where a run's model and data come from, as far as that is known on this machine."""

from pathlib import Path
from typing import Any

from hfedmoe.config import DataConfig, ModelConfig
from hfedmoe.data.known import known_set
from hfedmoe.data.sources import HUB_ID, IN_WHEEL, PACKAGED, is_file
from hfedmoe.loading import PACKAGED as PACKAGED_MODELS

PACKAGED_ORIGIN = {"smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}
"""Hub id and licence of packaged models that have them."""


def origin(model: ModelConfig) -> tuple[str | None, str | None]:
    """Hub id and licence of a run's base model.

    A local model has no id of its own, whatever it was made from; its licence is what its card says.
    """
    if model.name in PACKAGED_MODELS:
        return PACKAGED_ORIGIN.get(model.name, (None, None))
    if is_local(model):
        folder = Path(model.name).expanduser()
        return None, _licence(folder / "README.md" if folder.is_dir() else folder.parent / "README.md")
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model.name, "README.md", revision=model.revision)
    return model.name, _licence(Path(cached)) if isinstance(cached, str) else None


def is_local(model: ModelConfig) -> bool:
    """Whether a run's base model is a folder or file of the user's."""
    return model.name not in PACKAGED_MODELS and Path(model.name).expanduser().exists()


def hub_data_set(data: DataConfig) -> str | None:
    """The hub id of a run's data; None: packaged, or files of the user's."""
    source = data.source
    if data.clients is not None or source in PACKAGED or source in IN_WHEEL:
        return None
    known = known_set(data)
    if known is not None and source == known.name:
        return known.hub
    local = is_file(source) or Path(source).expanduser().exists()
    return source if not local and "/" in source and HUB_ID.match(source) else None


def data_name(data: DataConfig) -> str:
    """What to call a run's data: a known name, a hub id, or a file's or folder's name without its path."""
    if data.clients is not None:
        return "a file per client: " + ", ".join(f"`{Path(file).name}`" for file in data.clients)
    hub, known = hub_data_set(data), known_set(data)
    name = f"`{hub or Path(data.source).name}`"
    if known is not None and data.source == known.name:
        name = f"`{known.name}`" + ("" if hub is None else f" (`{hub}`)")
    subset = data.subset or (known.subset if known is not None and data.source == known.name else None)
    return name + (f", subset `{subset}`" if subset else "")


def _licence(card: Path) -> str | None:
    from huggingface_hub import ModelCard

    if not card.is_file():
        return None
    known: dict[str, Any] = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    value = known.get("license")
    return value if isinstance(value, str) else None
