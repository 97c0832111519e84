"""Atomic checkpoints.

```
checkpoints/round-0003/model.safetensors
                       clients.safetensors   only if the clients keep tensors: those that changed in this round
                       clients-0002.safetensors   what has not changed since round 2: a hard link to that file
                       state.json            {"round", "score", "metric", "files": {name: {"bytes", "sha256"}}, "state"}
```
A round writes only the clients' tensors that changed. Every checkpoint still has the tensors of all clients, and other
checkpoints can be deleted. When more than half of the entries are out of date, all are written again. A file and its
hard links are one file on the disk: if it is damaged, so is every checkpoint that has it.

A checkpoint is written under another name and renamed when it is on the disk, so a killed process does not damage
earlier ones. Sizes and checksums show later damage.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hfedmoe.errors import UserError
from hfedmoe.files.disk import FULL, UNFINISHED, discard, resume_hint, sync, sync_file, sync_folder

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

Which = int | Literal["last", "best"]
MODEL, CLIENTS, STATE = "model.safetensors", "clients.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: tensors on the CPU (not shared), and the `state` that the caller saved."""

    round: int
    tensors: dict[str, "Tensor"]
    clients: dict[str, "Tensor"] | None
    state: dict[str, Any]
    score: float | None
    path: Path


@dataclass(frozen=True)
class Manifest:
    """state.json of a checkpoint whose files have the right sizes; the checksums are not checked yet."""

    round: int
    score: float | None
    metric: str
    files: dict[str, dict[str, Any]]
    state: dict[str, Any]
    path: Path


class Damaged(Exception):
    """A damaged checkpoint; the message says what is wrong."""


def saved_rounds(root: Path) -> list[int]:
    """Rounds with a checkpoint folder, damaged or not, in order."""
    if not root.is_dir():
        return []
    return sorted(int(m[1]) for m in (re.fullmatch(r"round-(\d{4,})", p.name) for p in root.iterdir()) if m)


def folder_of(root: Path, round: int) -> Path:
    """The folder of a round's checkpoint."""
    return root / f"round-{round:04d}"


def write(
    root: Path,
    round: int,
    tensors: dict[str, "Tensor"],
    state: dict[str, Any],
    clients: dict[str, "Tensor"] | None,
    score: float | None,
    metric: str,
    since: int | None = None,
) -> Path:
    """Write one checkpoint, whole or not at all. A checkpoint of the same round is replaced.

    With `since`, tensors that are not in `clients` are taken from the checkpoint of that round.
    `state` must be JSON (tuples are read back as lists; NaN and infinity are kept).
    Raises OSError on a failed write, UserError if the client files of `since` are damaged; then nothing is written.
    """
    root.mkdir(exist_ok=True)
    earlier = [] if since is None or clients is None else _earlier(root, since, set(clients))
    for leftover in root.glob(UNFINISHED + "*"):
        shutil.rmtree(leftover)
    folder = folder_of(root, round)
    unfinished = root / (UNFINISHED + folder.name)
    unfinished.mkdir()
    try:
        files = {MODEL: _write_tensors(unfinished / MODEL, tensors)}
        if clients is not None and 2 * len(_names(earlier) | set(clients)) < _entries(earlier) + len(clients):
            with _going_on(earlier[0].path.parent):
                for part in earlier:  # before damaged data gets a new, valid checksum
                    _check_sum(part.path, part.entry)
                clients, earlier = _merged(earlier) | clients, []
        if clients is not None:
            files[CLIENTS] = _write_tensors(unfinished / CLIENTS, clients)
        for part in earlier:
            _link(part.path, unfinished / part.name)
            files[part.name] = part.entry
        score = score if score is not None and math.isfinite(score) else None
        manifest = {"round": round, "score": score, "metric": metric, "files": files, "state": state}
        with (unfinished / STATE).open("wb") as file:
            file.write(json.dumps(manifest).encode())
            sync(file)
        sync_folder(unfinished)
        if folder.exists():
            discard(folder)
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    sync_folder(root)
    return folder


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best one; those with wrong sizes are deleted too."""
    found = in_full_size(root)
    best = best_of(found)
    kept = {manifest.round for manifest in [*found[-keep:], *([best] if best else [])]}
    for round in saved_rounds(root):
        if round not in kept:
            discard(folder_of(root, round))


def drop_after(root: Path, last: int) -> None:
    """Delete the checkpoints after a round."""
    for round in saved_rounds(root):
        if round > last:
            discard(folder_of(root, round))


def in_full_size(root: Path, warn: bool = False) -> list[Manifest]:
    """The checkpoints whose files have the right sizes, in order; `warn`: log a warning about each other one."""
    found = []
    for round in saved_rounds(root):
        try:
            found.append(read_manifest(folder_of(root, round)))
        except Damaged as damage:
            if warn:
                logger.warning("%s is damaged (%s); skipped", folder_of(root, round), damage)
    return found


def best_of(found: list[Manifest]) -> Manifest | None:
    """The checkpoint with the highest score, the newest of equal ones; None: no checkpoint has a score."""
    scored = [(manifest.score, manifest.round, manifest) for manifest in found if manifest.score is not None]
    return max(scored, key=lambda entry: entry[:2])[2] if scored else None


def read(root: Path, which: Which) -> Checkpoint:
    """Load a checkpoint; "last" and "best" skip damaged ones with a warning.

    Raises:
        UserError: there is no such checkpoint, or all are damaged.
    """
    require(root, which)
    if isinstance(which, int):
        try:
            return _load(read_manifest(folder_of(root, which)))
        except Damaged as damage:
            raise UserError(f"{folder_of(root, which)}: damaged ({damage}); use another round") from None
    for path in _candidates(root, which):
        try:
            return _load(read_manifest(path))
        except Damaged as damage:
            logger.warning("%s is damaged (%s); trying the one before", path, damage)
    if which == "best" and any(manifest.score is None for manifest in in_full_size(root)):
        raise UserError(f"{root}: no undamaged checkpoint has a score; use --checkpoint last, or the number of a round")
    raise UserError(f"{root}: every checkpoint is damaged; start the run again with `hfedmoe run`")


def require(root: Path, which: Which) -> None:
    """Raise UserError if there is no checkpoint, or none of the round that is asked for; none is read."""
    rounds = saved_rounds(root)
    if not rounds:
        raise UserError(f"{root}: no checkpoint yet; the run was stopped too early, start it again with `hfedmoe run`")
    if isinstance(which, int) and which not in rounds:
        known = ", ".join(str(round) for round in rounds)
        raise UserError(f"{folder_of(root, which)}: no checkpoint of round {which}; there are rounds {known}")


def read_manifest(folder: Path) -> Manifest:
    """Read state.json and compare the sizes of the files. Raises Damaged."""
    try:
        tree = json.loads((folder / STATE).read_bytes())
        manifest = Manifest(tree["round"], tree["score"], tree["metric"], tree["files"], tree["state"], folder)
        sizes = {name: entry["bytes"] for name, entry in manifest.files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{STATE}: {error}") from None
    if MODEL not in sizes or folder_of(folder.parent, manifest.round) != folder:
        raise Damaged(f"{STATE} is of another round")
    for name, size in sizes.items():
        actual = (folder / name).stat().st_size if (folder / name).is_file() else None
        if actual is None:
            raise Damaged(f"{name} is missing")
        if actual != size:
            raise Damaged(f"{name} has {actual} bytes instead of {size}")
    return manifest


def _candidates(root: Path, which: Literal["last", "best"]) -> list[Path]:
    if which == "last":
        return [folder_of(root, round) for round in reversed(saved_rounds(root))]
    found = in_full_size(root, warn=True)
    order = []
    while best := best_of(found):
        found.remove(best)
        order.append(best.path)
    return order


def _load(manifest: Manifest) -> Checkpoint:
    """Raises Damaged."""
    for name, entry in manifest.files.items():
        _check_sum(manifest.path / name, entry)
    tensors = _read_tensors(manifest.path / MODEL)
    clients = _merged(_client_parts(manifest)) if CLIENTS in manifest.files else None
    return Checkpoint(manifest.round, tensors, clients, manifest.state, manifest.score, manifest.path)


@dataclass(frozen=True)
class _ClientPart:
    """A file with clients' tensors: its path, its name in later checkpoints, its entry in the manifest."""

    path: Path
    name: str
    entry: dict[str, Any]
    names: frozenset[str] = frozenset()


def _client_parts(manifest: Manifest) -> list[_ClientPart]:
    """The files with clients' tensors, newest first; a tensor in a newer file replaces the same in an older one."""
    older = sorted(
        (name for name in manifest.files if re.fullmatch(r"clients-\d{4,}\.safetensors", name)), key=_written
    )
    parts = [_ClientPart(manifest.path / name, name, manifest.files[name]) for name in reversed(older)]
    if CLIENTS in manifest.files:
        own = f"clients-{manifest.round:04d}.safetensors"
        parts.insert(0, _ClientPart(manifest.path / CLIENTS, own, manifest.files[CLIENTS]))
    return parts


def _written(name: str) -> int:
    return int(name.removeprefix("clients-").removesuffix(".safetensors"))


def _earlier(root: Path, since: int, newer: set[str]) -> list[_ClientPart]:
    """The files of checkpoint `since` that are still needed for tensors not in `newer`, newest file first."""
    from safetensors import SafetensorError, safe_open

    seen, needed = set(newer), []
    path = folder_of(root, since)
    with _going_on(path):
        for part in _client_parts(read_manifest(path)):
            try:
                with safe_open(part.path, "pt") as file:
                    names = frozenset(file.keys())
            except (OSError, SafetensorError) as error:
                raise Damaged(f"{part.path.name}: {error}") from None
            if names - seen:
                needed.append(replace(part, names=names))
            seen |= names
    return needed


@contextmanager
def _going_on(path: Path) -> Iterator[None]:
    """Turn damage to the last checkpoint of a running federation into a UserError with the way out."""
    try:
        yield
    except Damaged as damage:
        raise UserError(
            f"{path}: damaged during the run ({damage}); {resume_hint(path.parent.parent)} continues from an "
            "undamaged earlier checkpoint; if there is none, start the run again"
        ) from None


def _names(parts: list[_ClientPart]) -> set[str]:
    return {name for part in parts for name in part.names}


def _entries(parts: list[_ClientPart]) -> int:
    return sum(len(part.names) for part in parts)


def _merged(parts: list[_ClientPart]) -> dict[str, "Tensor"]:
    """The tensors of several files, newest first; a newer file takes precedence. Raises Damaged."""
    return {name: tensor for part in reversed(parts) for name, tensor in _read_tensors(part.path).items()}


def _read_tensors(path: Path) -> dict[str, "Tensor"]:
    """Raises Damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise Damaged(f"{path.name}: {error}") from None


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in FULL:
            raise
        shutil.copyfile(source, target)  # a file system without hard links
        sync_file(target)


def _write_tensors(path: Path, tensors: dict[str, "Tensor"]) -> dict[str, Any]:
    """Write a safetensors file and compute its checksum in the same pass; returns the entry for the manifest."""
    from hfedmoe.files.blob import chunks

    total, checksum = 0, hashlib.sha256()
    with path.open("wb") as file:
        for chunk in chunks(tensors):
            file.write(chunk)
            checksum.update(chunk)
            total += len(chunk)
        sync(file)
    return {"bytes": total, "sha256": checksum.hexdigest()}


def _check_sum(path: Path, entry: dict[str, Any]) -> None:
    """Raise Damaged if a file does not have the checksum of its manifest entry."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Damaged(f"{path.name}: {error}") from None
    if found != entry.get("sha256"):
        raise Damaged(f"{path.name} has another checksum")
