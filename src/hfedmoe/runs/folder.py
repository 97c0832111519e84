"""One run on disk. See `hfedmoe.runs` for what is in the folder."""

import datetime
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hfedmoe.config import RunConfig
from hfedmoe.errors import UserError
from hfedmoe.files.disk import UNFINISHED, disk_errors, lock, replacing, resume_hint
from hfedmoe.runs import checkpoints, experts, rounds
from hfedmoe.runs.settings import read_run_config, run_config_toml

if TYPE_CHECKING:
    from torch import Tensor


class RunFolder:
    """The folder of a run; made by `create` or `open`, and closed by `close` or the end of a `with` block.

    Every method that writes raises UserError if the disk is full or the folder not writable. What was written
    before stays as it was.
    """

    def __init__(self, path: Path, config: RunConfig, claim: IO[bytes] | None) -> None:
        self.path = path
        self.config = config
        self._checkpoints = path / "checkpoints"
        self._claim = claim

    @classmethod
    def create(cls, path: Path | None, config: RunConfig, root: Path = Path("runs")) -> "RunFolder":
        """Make the folder of a new run and claim it for this process.

        Without a path it is `root`/<date>-<name>, with -2, -3 and so on if that is taken.

        Raises:
            UserError: the path is a file or a folder that is not empty, cannot be written, or is claimed.
        """
        then = "run again, or choose another --out"
        if path is None:
            path = _fresh(root, f"{datetime.date.today():%Y-%m-%d}-{config.name}", then)
        else:
            with disk_errors(path, then):
                if path.exists() and not path.is_dir():
                    raise UserError(f"{path}: is a file; choose another --out")
                path.mkdir(parents=True, exist_ok=True)
                _refuse_unless_empty(path)
        claim = lock(path, then)
        try:
            with disk_errors(path / "config.toml", then):
                _refuse_unless_empty(path)  # somebody may have been quicker to the lock
                with replacing(path / "config.toml") as file:
                    file.write(run_config_toml(config))
        except BaseException:
            claim.close()
            raise
        return cls(path, config, claim)

    def settle(self, config: RunConfig) -> None:
        """Write the settings again, now that the data has said what they leave open."""
        path = self.path / "config.toml"
        with disk_errors(path, "run again, or choose another --out"), replacing(path) as file:
            file.write(run_config_toml(config))
        self.config = config

    @classmethod
    def open(cls, path: Path, to_write: bool = False) -> "RunFolder":
        """Open the folder of an earlier run: to read it, even while it goes on, or `to_write` to claim and resume it.

        Raises:
            UserError: not a run folder, its config is broken, or (to write) another process is working on it.
        """
        if not path.is_dir():
            raise UserError(f"{path}: no such run folder; `ls runs` shows what is there")
        config = read_run_config(path / "config.toml")
        return cls(path, config, lock(path, resume_hint(path)) if to_write else None)

    def close(self) -> None:
        """Give up the claim; reading still works."""
        if self._claim is not None:
            self._claim.close()
            self._claim = None

    def discard(self) -> None:
        """Take a fresh folder back, because nothing ran in it; anything else that is in it stays."""
        for name in ("config.toml", ".lock"):
            (self.path / name).unlink(missing_ok=True)
        self.close()
        with suppress(OSError):  # not empty, or somebody's mount point
            self.path.rmdir()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # rounds

    def append_round(self, record: dict[str, Any], clients: Iterable[dict[str, Any]] | None = None) -> None:
        """Add the line of a round to metrics.jsonl; `record["round"]` is its number, NaN and infinity become null.

        `clients` may come one by one instead of as `record["clients"]`, so that no list of them is in memory.
        """
        with self._writing("metrics.jsonl") as path:
            rounds.append(path, record, clients)

    def read_rounds(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; one torn by a kill is left out."""
        return rounds.read(self.path / "metrics.jsonl")

    def iter_rounds(self) -> Iterator[dict[str, Any]]:
        """As `read_rounds`, one line at a time."""
        return rounds.iterate(self.path / "metrics.jsonl")

    @contextmanager
    def expert_rows(self, round: int, num_experts: Sequence[int]) -> Iterator[Callable[..., None]]:
        """Add (or replace) a round in experts.npy, client by client, as the arguments of `RoundRows.add`.

        The vectors are [sum E_l], layer after layer, E_l from `num_experts` [L]; anything numpy reads as such an array
        will do, a CPU tensor too. The rows count when the block ends well; after an exception there are none.
        """
        with self._writing("experts.npy") as path:
            rows = experts.RoundRows(path, round, num_experts)

        def add(*row: Any) -> None:
            with self._writing("experts.npy"):
                rows.add(*row)

        try:
            yield add  # not below `_writing`: what fails in the caller's block has nothing to do with this file
            with self._writing("experts.npy"):
                rows.commit()
        finally:
            with self._writing("experts.npy"):
                rows.drop()

    def read_expert_rows(self) -> Any:
        """experts.npy as it is, a row per round and client, mapped and not read; None before the first round."""
        return experts.rows(self.path / "experts.npy")

    # checkpoints

    def saved_rounds(self) -> list[int]:
        """The rounds that have a checkpoint, in order."""
        return checkpoints.saved_rounds(self._checkpoints)

    def save_checkpoint(
        self,
        round: int,
        tensors: dict[str, "Tensor"],
        state: dict[str, Any],
        clients: dict[str, "Tensor"] | None = None,
        score: float | None = None,
        metric: str = "accuracy",
        since: int | None = None,
    ) -> Path:
        """Write the checkpoint of a round, whole or not at all, then delete those no longer kept.

        Kept are the newest `config.keep_checkpoints` and the best (the highest `score`, of which `metric` is the
        name). With `since`, `clients` are those that changed since the checkpoint of that round, and the others are as
        they were there.

        Call it after the other records of the round: it vouches for them, and resuming drops later ones.
        """
        with self._writing("checkpoints") as root:
            folder = checkpoints.write(root, round, tensors, state, clients, score, metric, since)
            checkpoints.prune(root, self.config.keep_checkpoints)
        self._note_best()
        return folder

    def load_checkpoint(self, which: checkpoints.Which = "last") -> checkpoints.Checkpoint:
        """Load the checkpoint of a round, the last or the best; the two words pass over damaged ones with a warning.

        Raises:
            UserError: there is no such checkpoint, or none that is undamaged.
        """
        return checkpoints.read(self._checkpoints, which)

    def rewind(self, round: int) -> None:
        """Forget everything later than a round, so that the run can go on from its checkpoint."""
        with self._writing("checkpoints") as root:
            checkpoints.drop_after(root, round)
        self._note_best()
        with self._writing("metrics.jsonl") as path:
            rounds.drop_after(path, round)
        with self._writing("experts.npy") as path:
            experts.drop_after(path, round)

    def _note_best(self) -> None:
        """Write best.json for people and scripts; `load_checkpoint` itself asks the checkpoints."""
        best = checkpoints.best_of(checkpoints.in_full_size(self._checkpoints))
        with self._writing("best.json") as path:
            if best is None:
                path.unlink(missing_ok=True)
                return
            note = {"round": best.round, "metric": best.metric, "score": best.score}
            note["checkpoint"] = best.path.relative_to(self.path).as_posix()
            with replacing(path) as file:
                file.write(json.dumps(note).encode() + b"\n")

    @contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        assert self._claim is not None, "opened to read; use RunFolder.open(path, to_write=True)"
        path = self.path / name
        with disk_errors(path, resume_hint(self.path)):
            yield path


def _fresh(root: Path, name: str, then: str) -> Path:
    with disk_errors(root, then):
        root.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            path = root / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir()
                return path
            except FileExistsError:
                continue
    raise AssertionError("unreachable")


def _refuse_unless_empty(path: Path) -> None:
    """Raise UserError if a folder has anything but what a start that failed leaves behind."""
    found = [entry.name for entry in path.iterdir() if entry.name != ".lock" and not entry.name.startswith(UNFINISHED)]
    if "config.toml" in found:
        raise UserError(f"{path}: holds a run already; choose another --out, or {resume_hint(path)}")
    if found:
        raise UserError(f"{path}: is not empty ({found[0]}); choose another --out")
