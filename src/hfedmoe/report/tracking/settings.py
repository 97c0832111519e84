"""What a tracker is told once about a run: its settings, and the versions that made its numbers."""

import json
from pathlib import PurePath
from typing import Any

from hfedmoe.config import RunConfig
from hfedmoe.runs.settings import versions_here

WITHHELD = ("tracking", "data.labels", "data.label_words", "data.clients")
"""The labels are what the cells of a column say; files tell more of their machine than a tracker needs."""
PATHS = ("model.name", "data.source", "data.test")
Setting = str | int | float | bool


def told(config: RunConfig) -> dict[str, Setting]:
    """The settings by their keys (`train.lr`), without labels; of a path only its last part. Lists are JSON."""
    found: dict[str, Setting] = {f"versions.{name}": version for name, version in versions_here().items()}
    for key, value in _flat(config.model_dump(mode="json")):
        if value is None or any(key == name or key.startswith(f"{name}.") for name in WITHHELD):
            continue
        if key in PATHS and PurePath(value).is_absolute():
            value = PurePath(value).name
        found[key] = value if isinstance(value, Setting) else json.dumps(value)
    return found


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value))
    return found
