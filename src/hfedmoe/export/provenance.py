"""The origin of a run's model and data, as far as it is known on this machine."""

from pathlib import Path
from typing import Any

from hfedmoe.config import DataConfig, ModelConfig
from hfedmoe.data.known import known_set
from hfedmoe.data.sources import HUB_ID, IN_WHEEL, PACKAGED_ROWS, is_file
from hfedmoe.models.names import PACKAGED_MODELS

_SMOLLM2 = ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
PACKAGED_ORIGIN = {"smollm2": _SMOLLM2, "smollm2-domains": _SMOLLM2}
"""Packaged model -> hub id and licence."""


def origin(model: ModelConfig) -> tuple[str | None, dict[str, Any]]:
    """Hub id of a run's base model, and the licence entries of its card. A local model has no id."""
    if model.name in PACKAGED_MODELS:
        name, packaged = PACKAGED_ORIGIN.get(model.name, (None, None))
        return name, {} if packaged is None else {"license": packaged}
    if is_local(model):
        folder = Path(model.name).expanduser()
        return None, _licence(folder / "README.md" if folder.is_dir() else folder.parent / "README.md")
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model.name, "README.md", revision=model.revision)
    licence = _licence(Path(cached)) if isinstance(cached, str) else {}
    link = licence.get("license_link")
    if link is not None and "://" not in link:  # a file of the base model, which is not in the export
        licence["license_link"] = f"https://huggingface.co/{model.name}/blob/{model.revision or 'main'}/{link}"
    return model.name, licence


def is_local(model: ModelConfig) -> bool:
    """Whether a run's base model is the user's own folder or file."""
    return model.name not in PACKAGED_MODELS and Path(model.name).expanduser().exists()


def hub_data_set(data: DataConfig) -> str | None:
    """The hub id of a run's data; None: packaged, or the user's own files."""
    source = data.source
    if data.clients is not None or source in PACKAGED_ROWS or source in IN_WHEEL:
        return None
    known = known_set(data)
    if known is not None and source == known.name:
        return known.hub
    local = is_file(source) or Path(source).expanduser().exists()
    return source if not local and "/" in source and HUB_ID.match(source) else None


def data_name(data: DataConfig) -> str:
    """The name of a run's data: a known name, a hub id, or a file or folder name without its path."""
    if data.clients is not None:
        return "a file per client: " + ", ".join(f"`{Path(file).name}`" for file in data.clients)
    hub, known = hub_data_set(data), known_set(data)
    name = f"`{hub or Path(data.source).name}`"
    if known is not None and data.source == known.name:
        name = f"`{known.name}`" + ("" if hub is None else f" (`{hub}`)")
    subset = data.subset or (known.subset if known is not None and data.source == known.name else None)
    return name + (f", subset `{subset}`" if subset else "")


def _licence(card: Path) -> dict[str, Any]:
    """The licence in a card's front matter, with name and link if it is "other"; {} if it cannot be read.

    Cards are written by hand, so any content is possible.
    """
    import yaml  # type: ignore[import-untyped]
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    try:
        front = REGEX_YAML_BLOCK.search(card.read_text(encoding="utf-8", errors="replace"))
        known = yaml.safe_load(front.group(2)) if front is not None else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    if not isinstance(known, dict):
        return {}
    value = known.get("license")
    several = isinstance(value, list) and value and all(isinstance(one, str) for one in value)
    if not isinstance(value, str) and not several:
        return {}
    more = {key: known[key] for key in ("license_name", "license_link") if isinstance(known.get(key), str)}
    return {"license": value, **(more if value == "other" else {})}
