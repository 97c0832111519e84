"""A digest of a base model: clients and server must use the same frozen weights, which are never sent.

Devices and servers compare all bytes of every stored tensor, so that a damaged copy is noticed before it trains: this
reads the whole model once, and again when a file changes. A run folder and a cell of a comparison only say which model
it was: for that name, dtype, shape and some bytes of every tensor are enough, because weights that were trained or
converted differ everywhere.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hfedmoe.config import RunConfig
from hfedmoe.errors import UserError
from hfedmoe.files.cache import cache_folder
from hfedmoe.files.disk import replacing
from hfedmoe.models.carved import checkpoint_folder, weight_files
from hfedmoe.moe.weights.shards import CheckpointError, Shards, places_in

SAMPLE = 64
"""Bytes read at the beginning, the middle and the end of a tensor where some are enough."""
PIECE = 1 << 22
"""Bytes read at a time where all are read."""
Read = Callable[[Path, int, int], Iterator[bytes]]
"""Reads bytes of a file, from a place to another: all, or some."""


def base_digest(config: RunConfig) -> str:
    """A digest of every byte of a run's frozen weights, and of the random numbers for new ones: 32 hexadecimal digits.

    It is the same for a server that holds the whole model and for a device that reads some experts of a checkpoint,
    in any precision.

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
    parts = [json.dumps(made, sort_keys=True), _draws(config.seed), _digest(config, _all, "all")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _draws(seed: int) -> str:
    """Some random numbers of a seed: another torch version may draw others, and so another frozen LoRA A."""
    import torch

    return str(torch.randint(1 << 30, (8,), generator=torch.Generator().manual_seed(seed)).tolist())


def weights_digest(config: RunConfig) -> str:
    """A digest of some bytes of every stored weight of a run's base model. Raises UserError like `base_digest`."""
    return _digest(config, _samples)


def _digest(config: RunConfig, read: Read, kind: str = "") -> str:
    """A digest of what `read` reads of the stored weights; `kind` is part of the name under which it is kept."""
    name = config.model.name
    if name == "tiny":
        return name
    try:
        plain = config.model.model_copy(update={"upcycle": None})
        folder = checkpoint_folder(plain)
        if folder is not None:
            Shards(folder)  # raises for a damaged checkpoint, and for FP8 tensors without their config
        files = weight_files(plain)
        of = _of_tensors if files[0].suffix == ".safetensors" else _of_files
        return _remembered(files, kind, lambda: of(files, read))
    except CheckpointError as error:
        raise UserError(f"model.name = {name}: {error}") from None


def _of_tensors(files: list[Path], read: Read) -> str:
    """Of safetensors files, quantised or not; tensors may be in any file."""
    places = dict(item for file in files for item in places_in(file))
    found = hashlib.sha256()
    for name in sorted(places):
        place = places[name]
        found.update(f"{name} {place.dtype or place.stored_as} {place.shape}".encode())
        for piece in read(place.file, place.start, place.end):
            found.update(piece)
    return found.hexdigest()


def _of_files(files: list[Path], read: Read) -> str:
    found = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        if read is _all:
            parts = [(0, size)]
        else:
            parts = [(at, min(size, at + SAMPLE)) for at in range(0, size, max(1, size // 64))]
        for start, end in parts:
            for piece in read(file, start, end):
                found.update(piece)
    return found.hexdigest()


def _samples(file: Path, start: int, end: int) -> Iterator[bytes]:
    with file.open("rb", buffering=0) as stream:
        for at in sorted({start, max(start, (start + end - SAMPLE) // 2), max(start, end - SAMPLE)}):
            stream.seek(at)
            yield stream.read(min(SAMPLE, end - at))


def _all(file: Path, start: int, end: int) -> Iterator[bytes]:
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        for at in range(start, end, PIECE):
            left = min(PIECE, end - at)
            while left:
                piece = stream.read(left)
                if not piece:
                    raise CheckpointError(f"{file}: ends before its last tensor; get the model again")
                left -= len(piece)
                yield piece


def _remembered(files: list[Path], kind: str, compute: Callable[[], str]) -> str:
    """The cached digest for files with these paths, sizes and times; computed and cached if there is none."""
    known: list[Any] = [kind] if kind else []
    known += [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
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
    except OSError:  # not cached: computed again next time
        return digest
    return digest


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of what a tokenizer does: its vocabulary, its special tokens, its chat template, and some texts."""
    tried = ["Hello, world!  Two  spaces\n\tand naïve café 12345", "def f(x):\n    return x ** 2", "東京 🙂"]
    known = [
        sorted(tokenizer.get_vocab().items()),
        sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()),
        str(getattr(tokenizer, "chat_template", None)),
        [tokenizer(text)["input_ids"] for text in tried],
    ]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]
