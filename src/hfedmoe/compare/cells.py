"""One cell: what it is, and the file with what came out of it."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from hfedmoe.config import RunConfig
from hfedmoe.errors import UserError
from hfedmoe.files.disk import replacing
from hfedmoe.method.methods import METHODS

FORMAT = 1
Kind = TypeVar("Kind", "Round", "Result")
UNIMPORTANT: dict[str, Any] = {
    "name": True,
    "keep_checkpoints": True,
    "carrier": True,
    "tracking": True,
    "evaluation": {"own_share": True, "own_rows": True, "alone": True, "tune_steps": True, "personal_every": True},
}
"""Settings that do not change a result; in a cell clients keep no rows back, and train no further for themselves."""


@dataclass(frozen=True)
class Cell:
    """One method with one seed."""

    method: str
    seed: int
    config: RunConfig
    """With this method and seed."""
    label: str = ""
    """What else tells it from other cells, for people (`grid.Point.label`)."""
    row: str = ""
    """The row of the table that it belongs to (`rows.Row.name`); empty: that of its method."""

    @property
    def shown(self) -> str:
        """The name of its row."""
        return self.row or self.method

    @property
    def digest(self) -> str:
        """Of everything in the configuration that decides the result.

        Settings at their defaults are left out, so that a cell keeps its name when a later version has more settings.
        So are budgets that nothing depends on: a limit such as `unlimited` is computed once for all of them.
        """
        tree = self.config.model_dump(mode="json", exclude_defaults=True, exclude=UNIMPORTANT)
        row = METHODS[self.method]
        if row.unlimited and not row.limits_otherwise:
            tree.get("clients", {}).pop("budgets", None)
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.method}-seed{self.seed}-{self.digest}.json"


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
    """On the validation rows (`evaluation.watch_rows`), which are no test rows; likewise the next two."""
    watch_macro_f1: float | None = None
    watch_loss: float | None = None


def _of(kind: type[Kind], tree: dict[str, Any]) -> Kind:
    """Fields that a file lacks have their default; those of a later version are ignored."""
    return kind(**{entry.name: tree[entry.name] for entry in fields(kind) if entry.name in tree})


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
    client_accuracy_prior: list[float] = field(default_factory=list)
    """The same where each client adds the logarithm of its own label shares to the scores (`measuring.hits`); as
    above for models of the clients' own, which know them. Empty also in files of earlier versions."""
    client_peak_bytes: list[int] = field(default_factory=list)
    """Predicted peak of each client's sub-model in the last round; 0 for a client that was left out."""
    personal: bool = False
    """Whether clients keep models of their own; then the accuracies are means over the clients' models."""
    test_rows: int = 0
    """Rows of the accuracies; 0: not noted, as in the next fields."""
    watch_rows: int = 0
    layer_experts: list[int] = field(default_factory=list)
    """E_l of every layer."""
    held: list[list[int]] = field(default_factory=list)
    """Of each client: in how many rounds it held each expert, [sum E_l], layer after layer."""
    trained: list[list[int]] = field(default_factory=list)
    """Likewise: in how many rounds it trained each expert."""
    base: str = ""
    """Digest of the base model."""
    format: int = FORMAT

    @property
    def origin(self) -> tuple[str, str, str]:
        """Code, machine and base model. Two results of the same origin differ in nothing but their cell."""
        return self.code, json.dumps(self.machine, sort_keys=True), self.base

    def on_validation(self) -> "Result | None":
        """With the figures on the validation rows in place of those on the test rows; None if there are none."""
        if all(line.watch_accuracy is None for line in self.rounds):
            return None
        if self.personal and not self.watch_rows:
            return None  # of an earlier version, which measured a model that nobody has
        rounds = [
            replace(line, accuracy=line.watch_accuracy, macro_f1=line.watch_macro_f1, loss=line.watch_loss)
            for line in self.rounds
        ]
        return replace(self, rounds=rounds, client_accuracy=[], client_accuracy_prior=[])

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
            rounds = [_of(Round, line) for line in tree["rounds"]]
            return _of(cls, tree | {"rounds": rounds})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}: is not the result of a cell ({error}); delete it, and it is computed again"
            ) from None
