"""One cell: what it is, and the file with what came out of it."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hfedmoe.config import RunConfig
from hfedmoe.errors import UserError
from hfedmoe.files.disk import replacing

FORMAT = 1
UNIMPORTANT = {"name", "keep_checkpoints"}
"""Settings that do not change a result."""


@dataclass(frozen=True)
class Cell:
    """One method with one seed."""

    method: str
    seed: int
    config: RunConfig
    """With this method and seed."""

    @property
    def digest(self) -> str:
        """Of everything in the configuration that decides the result.

        Settings at their defaults are left out, so that a cell keeps its name when a later version has more settings.
        """
        tree = self.config.model_dump(mode="json", exclude_defaults=True, exclude=UNIMPORTANT)
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]

    def answered_by(self, folder: Path) -> bool:
        """Whether the folder has the result: a file whose settings are these, as far as its version had them.

        Raises:
            UserError: the file is not the result of a cell.
        """
        path = folder / self.file
        if not path.is_file():
            return False
        now = dict(_leaves(self.config.model_dump(mode="json", exclude=UNIMPORTANT)))
        return all(now.get(key, value) == value for key, value in _leaves(Result.read(path).config))

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.method}-seed{self.seed}-{self.digest}.json"


def _leaves(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting; `method.options` and other free tables are one value."""
    for name, value in tree.items():
        if isinstance(value, dict) and not above:
            yield from _leaves(value, f"{name}.")
        elif above or name not in UNIMPORTANT:
            yield above + name, value


@dataclass
class Round:
    """The federation after a round; round 0 is the model before training."""

    round: int
    accuracy: float | None = None
    macro_f1: float | None = None
    loss: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    """Of all clients in this round."""
    flops: float = 0.0
    """Of all clients in this round, estimated (`worker.flops_of`)."""
    clients: int = 0
    """That gave a valid update."""
    watch_accuracy: float | None = None
    """On the watched rows, which no other figure uses: settings are chosen by it."""


@dataclass
class Result:
    """What came out of a cell."""

    method: str
    seed: int
    digest: str
    config: dict[str, Any]
    code: str
    """Version and digest of the package."""
    machine: dict[str, Any]
    seconds: float
    peak_bytes: int
    """Of the process, which holds the whole model once and all clients one after the other."""
    rounds: list[Round]
    client_rows: list[int] = field(default_factory=list)
    client_accuracy: list[float] = field(default_factory=list)
    """Of each client's model on test rows with the client's own mix of labels; empty if rows have no labels."""
    client_peak_bytes: list[int] = field(default_factory=list)
    """Predicted peak of each client's sub-model in the last round; 0 for a client that was left out."""
    personal: bool = False
    """Whether clients keep models of their own; then the accuracies are means over the clients' models."""
    base: str = ""
    """Digest of the base model."""
    format: int = FORMAT

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        with replacing(path) as file:
            file.write(json.dumps(asdict(self), indent=1).encode() + b"\n")

    @classmethod
    def read(cls, path: Path) -> "Result":
        """Raises UserError if the file is not the result of a cell."""
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            if tree["format"] != FORMAT:
                raise ValueError(f"format {tree['format']}")
            rounds = [Round(**line) for line in tree.pop("rounds")]
            return cls(**{entry.name: tree[entry.name] for entry in fields(cls) if entry.name in tree}, rounds=rounds)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}: is not the result of a cell ({error}); delete it, and it is computed again"
            ) from None
