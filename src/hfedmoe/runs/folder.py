"""Read and write the folder of a run. See `hfedmoe.runs` for its files."""

import datetime
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hfedmoe.config import RunConfig
from hfedmoe.errors import UserError
from hfedmoe.events import Participant
from hfedmoe.files.disk import UNFINISHED, discard, disk_errors, lock, replacing, resume_hint
from hfedmoe.runs import about, checkpoints, experts, rounds
from hfedmoe.runs.settings import read_run_config, run_config_toml

if TYPE_CHECKING:
    from torch import Tensor


TUNED = "tuned"


class RunFolder:
    """The folder of a run; use `create` or `open` to get one, and `close` or a `with` block to close it.

    Every method that writes raises UserError if the disk is full or the folder is not writable. Data that was written
    before stays unchanged.
    """

    def __init__(self, path: Path, config: RunConfig, claim: IO[bytes] | None) -> None:
        self.path = path
        self.config = config
        self._checkpoints = path / "checkpoints"
        self._claim = claim

    @classmethod
    def create(cls, path: Path | None, config: RunConfig, root: Path = Path("runs")) -> "RunFolder":
        """Make the folder of a new run and lock it for this process.

        Without a path it is `root`/<date>-<name>, with -2, -3 and so on if that exists.

        Raises:
            UserError: the path is a file or a folder that is not empty, cannot be written, or is locked.
        """
        then = "run again, or choose another --out"
        if path is None:
            path = _fresh(root, f"{datetime.date.today():%Y-%m-%d}-{config.name}", then)
        else:
            cls.require_free(path)
            with disk_errors(path, then):
                path.mkdir(parents=True, exist_ok=True)
                _refuse_unless_empty(path)
        claim = lock(path, then)
        try:
            with disk_errors(path / "config.toml", then):
                _refuse_unless_empty(path)  # another process may have been faster
                with replacing(path / "config.toml") as file:
                    file.write(run_config_toml(config))
        except BaseException:
            claim.close()
            raise
        return cls(path, config, claim)

    @staticmethod
    def require_free(path: Path) -> None:
        """Raise UserError if the path of a new run is a file or a folder that is not empty; nothing is changed."""
        with disk_errors(path, "run again, or choose another --out"):
            if path.exists() and not path.is_dir():
                raise UserError(f"{path}: is a file; choose another --out")
            if path.is_dir():
                _refuse_unless_empty(path)

    def settle(self, config: RunConfig) -> None:
        """Replace the config; used when settings that depend on the data are known."""
        path = self.path / "config.toml"
        with disk_errors(path, "run again, or choose another --out"), replacing(path) as file:
            file.write(run_config_toml(config))
        self.config = config

    @classmethod
    def open(cls, path: Path, to_write: bool = False) -> "RunFolder":
        """Open the folder of a run, to read it (also during the run), or with `to_write` to lock and resume it.

        Raises:
            UserError: not a run folder, its config is broken, or (with `to_write`) another process is working on it.
        """
        if not path.is_dir():
            raise UserError(f"{path}: no such run folder; `ls runs` shows what is there")
        config = read_run_config(path / "config.toml")
        return cls(path, config, lock(path, resume_hint(path)) if to_write else None)

    def close(self) -> None:
        """Release the lock; reading still works."""
        if self._claim is not None:
            self._claim.close()
            self._claim = None

    def discard(self) -> None:
        """Delete a new folder in which nothing ran; files of others in it stay."""
        for name in ("config.toml", ".lock"):
            (self.path / name).unlink(missing_ok=True)
        self.close()
        with suppress(OSError):  # not empty, or a mount point
            self.path.rmdir()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # rounds

    def append_round(self, record: dict[str, Any], clients: Iterable[dict[str, Any]] | None = None) -> None:
        """Add the line of a round to metrics.jsonl; `record["round"]` is its number. NaN and infinity become null.

        `clients` is an iterable that replaces `record["clients"]`, so that they are not all in memory.
        """
        with self._writing("metrics.jsonl") as path:
            rounds.append(path, record, clients)

    def amend_round(self, round: int, more: dict[str, Any]) -> None:
        """Add entries to the line of a round."""
        with self._writing("metrics.jsonl") as path:
            rounds.amend(path, round, more)

    def read_rounds(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; an incomplete last line is left out."""
        return rounds.read(self.path / "metrics.jsonl")

    def iter_rounds(self) -> Iterator[dict[str, Any]]:
        """Like `read_rounds`, one line at a time."""
        return rounds.iterate(self.path / "metrics.jsonl")

    @contextmanager
    def expert_rows(self, round: int, num_experts: Sequence[int]) -> Iterator[Callable[..., None]]:
        """Add or replace a round in experts.npy; yields a function with the arguments of `RoundRows.add`.

        The vectors are [sum E_l], layer after layer, with E_l from `num_experts` [L]; any type that numpy can convert
        works, also CPU tensors. The rows are kept only if the block succeeds.
        """
        with self._writing("experts.npy") as path:
            rows = experts.RoundRows(path, round, num_experts)

        def add(*row: Any) -> None:
            with self._writing("experts.npy"):
                rows.add(*row)

        try:
            yield add  # not inside `_writing`: errors of the caller's block are not about this file
            with self._writing("experts.npy"):
                rows.commit()
        finally:
            with self._writing("experts.npy"):
                rows.drop()

    def read_expert_rows(self) -> Any:
        """The rows of experts.npy, one per round and client, memory-mapped; None before the first round."""
        return experts.rows(self.path / "experts.npy")

    def describe(self, known: about.About) -> None:
        """Write about.json: what is known when the run begins."""
        with self._writing(about.NAME):
            about.write(self.path, known)

    def note_clients(self, clients: Mapping[int, Participant]) -> None:
        """Add to about.json who takes part, by number, with what budget. Raises UserError if the file is damaged."""
        with self._writing(about.NAME):
            about.note_clients(self.path, clients)

    def append_answers(self, round: int, predicted: Sequence[int]) -> None:
        """Add what the model of a round answered to each held-out row to answers.jsonl."""
        with self._writing(about.ANSWERS):
            about.append_answers(self.path, round, predicted)

    # what clients trained for themselves

    def tuned(self, client: int) -> Path:
        """The file of what a simulated client trained for itself after the last round (`client.tuning`)."""
        return self.path / TUNED / f"client-{client}.safetensors"

    def save_tuned(self, client: int, blob: bytes) -> None:
        """Write the file of a client."""
        with self._writing(TUNED) as root:
            root.mkdir(exist_ok=True)
            with replacing(self.tuned(client)) as file:
                file.write(blob)

    def drop_tuned(self) -> None:
        """Delete the files of all clients."""
        with self._writing(TUNED) as root:
            if root.is_dir():
                discard(root)

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
        """Write the checkpoint of a round atomically, then delete old ones.

        The newest `config.keep_checkpoints` are kept, and the best one (highest `score`, whose name is `metric`). With
        `since`, `clients` has only the tensors that changed since the checkpoint of that round.

        Call it after the other records of the round: resuming keeps the records up to the last checkpoint.
        """
        with self._writing("checkpoints") as root:
            folder = checkpoints.write(root, round, tensors, state, clients, score, metric, since)
            checkpoints.prune(root, self.config.keep_checkpoints)
        self._note_best()
        return folder

    def load_checkpoint(self, which: checkpoints.Which = "last") -> checkpoints.Checkpoint:
        """Load the checkpoint of a round, the last or the best one; "last" and "best" skip damaged ones with a warning.

        Raises:
            UserError: there is no such checkpoint, or all are damaged.
        """
        return checkpoints.read(self._checkpoints, which)

    def require_checkpoint(self, which: checkpoints.Which) -> None:
        """Raise UserError if there is no such checkpoint; none is read."""
        checkpoints.require(self._checkpoints, which)

    def rewind(self, round: int) -> None:
        """Delete all records after a round, so that the run can continue from its checkpoint."""
        with self._writing("checkpoints") as root:
            checkpoints.drop_after(root, round)
        self._note_best()
        if round < self.config.federation.rounds:
            self.drop_tuned()
        with self._writing("metrics.jsonl") as path:
            rounds.drop_after(path, round)
        with self._writing(about.ANSWERS) as path:
            rounds.drop_after(path, round)
        with self._writing("experts.npy") as path:
            experts.drop_after(path, round)

    def _note_best(self) -> None:
        """Write best.json for people and scripts; `load_checkpoint` does not read it."""
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
    """Raise UserError if a folder has anything except the leftovers of a failed start."""
    found = [entry.name for entry in path.iterdir() if entry.name != ".lock" and not entry.name.startswith(UNFINISHED)]
    if "config.toml" in found:
        raise UserError(f"{path}: already has a run; choose another --out, or {resume_hint(path)}")
    if found:
        raise UserError(f"{path}: is not empty ({found[0]}); choose another --out")
