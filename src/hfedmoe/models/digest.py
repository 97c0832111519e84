"""A digest of a base model: clients and server must use the same frozen weights, which are never sent.

It is cheap: it reads name, dtype, shape and some bytes of every stored tensor (at the beginning, middle and end).
Weights that were trained or converted differ everywhere, so this is enough. It does not protect against weights that
are forged on purpose.
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
"""Bytes read at each of the three places of a tensor."""


def base_digest(config: RunConfig) -> str:
    """A digest of a run's frozen weights and of the random numbers for new ones: 32 hexadecimal digits.

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
    parts = [json.dumps(made, sort_keys=True), _draws(config.seed), weights_digest(config)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _draws(seed: int) -> str:
    """Some random numbers of a seed: another torch version may draw others, and so another frozen LoRA A."""
    import torch

    return str(torch.randint(1 << 30, (8,), generator=torch.Generator().manual_seed(seed)).tolist())


def weights_digest(config: RunConfig) -> str:
    """A digest of the stored weights of a run's base model. Raises UserError like `base_digest`."""
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
        return _remembered(files, lambda: of(files))
    except CheckpointError as error:
        raise UserError(f"model.name = {name}: {error}") from None


def _of_tensors(files: list[Path]) -> str:
    """Of safetensors files, quantised or not; tensors may be in any file."""
    places = dict(item for file in files for item in places_in(file))
    found = hashlib.sha256()
    for name in sorted(places):
        place = places[name]
        found.update(f"{name} {place.dtype or place.stored_as} {place.shape}".encode())
        for piece in _samples(place.file, place.start, place.end):
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
    """The cached digest for files with these paths, sizes and times; computed and cached if there is none."""
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
