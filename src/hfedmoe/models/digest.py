"""A digest of a base model: clients and server must train on the same frozen weights, which never travel.

Cheap: of every stored tensor its name, form and some bytes from its beginning, middle and end are read, not all of it.
Weights that were trained or converted differ everywhere, so that shows. It is no defence against somebody who forges
weights on purpose.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from hfedmoe.config import RunConfig
from hfedmoe.errors import UserError
from hfedmoe.files.cache import cache_folder
from hfedmoe.files.disk import replacing
from hfedmoe.models.carved import checkpoint_folder
from hfedmoe.models.names import PACKAGED_MODELS, source_of
from hfedmoe.models.packaged import gguf_file
from hfedmoe.moe.weights.shards import CheckpointError, Shards

SAMPLE = 64
"""Bytes read at each of three places of a tensor."""


def base_digest(config: RunConfig) -> str:
    """Names the frozen weights of a run, and the random numbers that fresh ones are drawn from: 32 hexadecimal digits.

    It is the same for a server that holds the whole model and a device that reads some experts of a checkpoint, in
    whatever precision they hold it.

    Raises:
        UserError: the model cannot be found or read.
    """
    model, train = config.model, config.train
    made = {
        "upcycle": None if model.upcycle is None else model.upcycle.model_dump(),
        "seed": config.seed,
        "experts": train.experts,
        "rank": train.rank,
        "lora": train.lora,
        "attention": train.attention,
    }
    parts = [json.dumps(made, sort_keys=True), _draws(config.seed), weights_digest(config)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _draws(seed: int) -> str:
    """Some random numbers of a seed: another version of torch may draw others, and with them another fixed A."""
    import torch

    return str(torch.randint(1 << 30, (8,), generator=torch.Generator().manual_seed(seed)).tolist())


def weights_digest(config: RunConfig) -> str:
    """Names the stored weights of a run's base model alone. Raises UserError as `base_digest`."""
    name = config.model.name
    if name == "tiny":
        return name
    try:
        plain = config.model.model_copy(update={"upcycle": None})
        folder = None if name in PACKAGED_MODELS else checkpoint_folder(plain)
        if folder is not None:
            shards = Shards(folder)
            return _remembered(sorted({entry.file for entry in shards.entries.values()}), lambda: _of_shards(shards))
    except CheckpointError as error:
        raise UserError(f"model.name = {name}: {error}") from None
    files = _other_files(config)
    return _remembered(files, lambda: _of_files(files))


def _other_files(config: RunConfig) -> list[Path]:
    """The weights of a model without safetensors: GGUF, or what is in its folder."""
    if config.model.name in PACKAGED_MODELS:
        packaged = gguf_file()
        return [] if packaged is None else [packaged]
    source, options = source_of(config.model)
    if "gguf_file" in options:
        return [Path(source) / options["gguf_file"]]
    folder = Path(source)
    return sorted(folder.glob("*.bin")) if folder.is_dir() else []


def _of_shards(shards: Shards) -> str:
    found = hashlib.sha256()
    for name in sorted(shards.entries):
        entry = shards.entries[name]
        found.update(f"{name} {entry.dtype} {entry.shape}".encode())
        for piece in _samples(entry.file, entry.start, entry.end):
            found.update(piece)
    return found.hexdigest()


def _of_files(files: list[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        for at in range(0, size, max(1, size // 64)):
            for piece in _samples(file, at, min(size, at + SAMPLE)):
                found.update(piece)
    return found.hexdigest()


def _samples(file: Path, start: int, end: int) -> Iterator[bytes]:
    with file.open("rb", buffering=0) as stream:
        for at in sorted({start, max(start, (start + end - SAMPLE) // 2), max(start, end - SAMPLE)}):
            stream.seek(at)
            yield stream.read(min(SAMPLE, end - at))


def _remembered(files: list[Path], compute: Callable[[], str]) -> str:
    """A digest that was computed before for files of the same names, sizes and times."""
    known = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    key = hashlib.sha256(json.dumps(known).encode()).hexdigest()
    place = cache_folder() / "digests" / key
    try:
        return place.read_text(encoding="ascii")
    except (OSError, ValueError):
        digest = compute()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place) as stream:
            stream.write(digest.encode())
    except OSError:  # it is computed again next time
        return digest
    return digest
