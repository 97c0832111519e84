"""`hfedmoe base`: build a base model, and check it."""

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

from hfedmoe.bases import branches
from hfedmoe.bases.acceptance import check, texts_read
from hfedmoe.bases.pretrain import Recipe, pretrain
from hfedmoe.bases.texts import Piece, pieces
from hfedmoe.config import ModelConfig
from hfedmoe.models.loading import load
from hfedmoe.models.packaged import smollm2_folder
from hfedmoe.report.progress import counted


def pretrain_base(out: Path, steps: int, seed: int) -> str:
    """Pre-train a base; returns one line that says what was written. Raises UserError as `pretrain`."""
    with counted(steps, "reading texts") as update:
        pretrain(
            out,
            Recipe(steps=steps, seed=seed),
            lambda step, _, loss, left: update(step, f"loss {loss:.3f}", left),
        )
    return f"{out}: a checkpoint for transformers; `hfedmoe base check {out}` measures its experts"


def branch_base(out: Path, steps: int, seed: int) -> str:
    """Branch the packaged model; returns one line that says what was written. Raises UserError as `build_branches`."""
    folder = smollm2_folder()
    recipe = branches.Recipe(steps=steps, seed=seed)
    loaded = load(ModelConfig(name=str(folder), device="cpu"), seed=0)
    with counted(steps * len(branches.DOMAINS), "reading texts") as update:
        texts = pieces("train", recipe.words)
        branches.build_branches(out, recipe, loaded.model, loaded.tokenizer, texts, update)
    return f"{out}: a checkpoint for transformers; `hfedmoe base check {out}` measures its experts"


def check_base(name: str, number: int, as_json: bool) -> tuple[str, bool]:
    """What was found, and whether the model passed. Raises UserError if the model or the texts are not there."""
    words = Recipe().words
    known = [piece for piece in pieces("train", words) if piece.domain != "dialogue"]
    held_out = pieces("test", words)
    loaded = load(ModelConfig(name=name, device="cpu"), seed=0)
    known, held_out = _some(known, number), _some(held_out, number)
    began = time.monotonic()
    with counted(texts_read(known, held_out), "loss with all experts, then with some") as update:

        def note(read: int) -> None:
            left = (time.monotonic() - began) / read * (texts_read(known, held_out) - read)
            update(read, "texts read", left)

        found = check(loaded.model, loaded.tokenizer, known, held_out, note=note)
    return (json.dumps(found.to_json(), indent=2) if as_json else found.as_text()), found.passed


def _some(all_pieces: Sequence[Piece], number: int) -> list[Piece]:
    """The same few texts of each domain, whenever it is asked."""
    draws = random.Random(0)
    by_domain: dict[str, list[Piece]] = {}
    for piece in all_pieces:
        by_domain.setdefault(piece.domain, []).append(piece)
    return [
        piece
        for domain in sorted(by_domain)
        for piece in draws.sample(by_domain[domain], min(number, len(by_domain[domain])))
    ]
