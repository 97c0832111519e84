"""The identity of a run, in `run.json` of its folder: simulated or deployed, its rows and its base model.

If a run were resumed or evaluated on other rows, training rows could become test rows.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from hfedmoe.config import RunConfig
from hfedmoe.data.example import Example
from hfedmoe.data.task import Task
from hfedmoe.errors import UserError
from hfedmoe.files.disk import replacing
from hfedmoe.models.digest import weights_digest

NAME = "run.json"
SIMULATED, IN_WORKERS, DEPLOYED = "simulated", "ray", "deployed"


@dataclass(frozen=True)
class Identity:
    """Facts about a run that must not change."""

    carrier: str
    """SIMULATED: the clients are in this process. IN_WORKERS: in those of Ray. DEPLOYED: they are devices."""
    rows: str
    """Digest of the training, test and watched rows, in their order, and of which client holds which training rows."""
    train_rows: int
    test_rows: int
    base: str
    """Digest of the base model's stored weights (`models.digest.weights_digest`)."""
    own_rows: int = 0
    """Rows that clients keep back from training (`data.kept`); 0 also in files of earlier versions, which had none."""


def identity_of(config: RunConfig, task: Task, watch: list[Example], carrier: str, own_rows: int = 0) -> Identity:
    """The current identity of a run, from its configuration, model and rows. Raises UserError without the model."""
    found = hashlib.sha256()
    for part in (task.train, task.test, watch):
        _add(found, part)
    if task.parts is not None:  # otherwise the seed decides who holds a row
        found.update(repr([list(part) for part in task.parts]).encode())
    return Identity(carrier, found.hexdigest()[:32], len(task.train), len(task.test), weights_digest(config), own_rows)


def _add(found: "hashlib._Hash", examples: Iterable[Example]) -> None:
    seen: dict[tuple[str, ...], bytes] = {}  # classification repeats the same choices in every row
    for example in examples:
        choices = seen.setdefault(example.choices, repr(example.choices).encode())
        rest = (example.text, example.answer, example.completion, example.messages, example.extras, example.tools)
        found.update(repr(rest).encode("utf-8", "surrogatepass") + choices)
    found.update(b"\n")


def write_identity(folder: Path, identity: Identity) -> None:
    """Write `run.json` in a run's folder."""
    with replacing(folder / NAME) as file:
        file.write(json.dumps(asdict(identity), indent=2).encode() + b"\n")


def read_identity(folder: Path) -> Identity | None:
    """The identity in a run's folder; None: there is none, because the run was stopped before it began.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / NAME
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return Identity(**{field.name: tree[field.name] for field in fields(Identity) if field.name in tree})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: is damaged ({error}); restore the file or start a new run") from None


def check_identity(folder: Path, now: Identity) -> None:
    """Raise UserError if a run's rows or model changed since it began."""
    was = read_identity(folder)
    if was is None:
        return
    if was.rows != now.rows:
        raise UserError(
            f"{folder}: its data changed since the run began: {was.train_rows} training and {was.test_rows} "
            f"test rows then, {now.train_rows} and {now.test_rows} now"
            f"{', with other contents or other clients' if _counts(was) == _counts(now) else ''}; restore the files of "
            "[data] in its config.toml, or start a new run"
        )
    _check_same_base(folder, was, now.base)


def check_base(folder: Path, config: RunConfig) -> None:
    """Raise UserError if a run's base model changed since it began; its rows are not looked at."""
    was = read_identity(folder)
    if was is not None:
        _check_same_base(folder, was, weights_digest(config))


def _check_same_base(folder: Path, was: Identity, base: str) -> None:
    if was.base != base:
        raise UserError(
            f"{folder}: its base model changed since the run began; restore the model of model.name in its "
            "config.toml, or start a new run"
        )


def _counts(identity: Identity) -> tuple[int, int]:
    return identity.train_rows, identity.test_rows
