"""What clients are called: by their file or their natural id, not by a number."""

from collections import Counter
from pathlib import Path

from hfedmoe.config import DataConfig
from hfedmoe.data.task import Task

LONGEST = 80
"""Characters of a name."""


def site_names(task: Task, config: DataConfig, number: int) -> list[str]:
    """A name for each client: its file without folder and suffix, its natural id, or "client 3"."""
    given = task.part_names
    if given is None or len(given) != number:
        return [f"client {client}" for client in range(number)]
    if config.clients is not None:
        paths = [_without_suffix(Path(name)) for name in given]
        stems = Counter(path.name for path in paths)
        given = [path.name if stems[path.name] == 1 else f"{path.parent.name}/{path.name}" for path in paths]
    names = [_printable(name) for name in given]
    same = Counter(names)
    return [name if same[name] == 1 else f"{name[: LONGEST - 8]} ({client})" for client, name in enumerate(names)]


def _without_suffix(path: Path) -> Path:
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).with_suffix("")


def _printable(name: str) -> str:
    shown = "".join(letter if letter.isprintable() else " " for letter in name).strip()
    return shown if len(shown) <= LONGEST else shown[: LONGEST - 3] + "..."
