"""A small dense model with experts that belong to domains: its upper feed-forward blocks are branched.

1. The layers below the branches are the same for all: their hidden states are computed once per text and kept.
2. Each branch learns low-rank changes from the texts of its own domains (`lowrank`); expert 0 is the model as it was.
3. Routers are fitted in closed form to tell from a token's hidden state whose text it is (`routers`).

The same seed gives the same model on the same machine. Building can be stopped at any time and goes on with the first
branch that is not finished.
"""

import json
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfedmoe.bases.lowrank import Deltas, train_branch
from hfedmoe.bases.routers import fit_routers
from hfedmoe.bases.stages import kept
from hfedmoe.bases.texts import Piece
from hfedmoe.errors import UserError
from hfedmoe.files.disk import replacing
from hfedmoe.files.whole import writing, written_whole
from hfedmoe.models.domains import write_changes
from hfedmoe.moe.branching import with_changes
from hfedmoe.moe.compact import multiplies_16_bit

DOMAINS: Mapping[str, tuple[str, ...]] = {
    "computing": ("computers", "technology"),
    "science": ("space", "medicine"),
    "leisure": ("sport", "motors", "market"),
    "beliefs": ("religion", "politics"),
    "firms": ("companies", "earnings"),
    "finance": ("economy", "money"),
    "resources": ("energy", "commodities"),
}
"""The domains of `texts` that each branch learns from, experts 1, 2, ...; dialogue is nobody's."""
CHANGES, RECIPE = "branches.safetensors", "recipe.json"


@dataclass(frozen=True)
class Recipe:
    """Everything that the model follows from, besides the dense model and the texts."""

    layers: int = 10
    """MoE layers; they are the model's last."""
    top_k: int = 2
    rank: int = 8
    words: int = 64
    tokens: int = 96
    texts: int = 128
    """Of each branch."""
    fitted: int = 32
    """Texts of each branch that the routers are fitted to."""
    batch: int = 4
    scored: int = 256
    """Tokens of a step whose loss is computed."""
    steps: int = 60
    """Of each branch."""
    lr: float = 3e-3
    temperature: float = 0.1
    general: float = 0.15
    """Share of tokens that have expert 0 among their experts."""
    seed: int = 0


Report = Callable[[int, str, float | None], None]
"""(steps done of all branches, what is going on, seconds left or None)."""


def build_branches(
    out: Path, recipe: Recipe, dense: Any, tokenizer: Any, texts: Sequence[Piece], report: Report
) -> None:
    """Build the base and write it as a transformers checkpoint, and the changes alone beside it.

    What is needed to go on lies in a folder beside `out` until it is done: call again to go on.

    Args:
        dense: a Llama model in float32, with its tokenizer.

    Raises:
        UserError: `out` is not empty, a branch has too few texts, or the state beside `out` is of another recipe.
    """
    state = out.with_name(f".{out.name}.branching")
    with written_whole(out) as scratch:
        with writing(out):
            state.mkdir(parents=True, exist_ok=True)
            _same_recipe(state, recipe)
        rows = _rows(texts, tokenizer, recipe)
        layers = range(dense.config.num_hidden_layers)[-recipe.layers :]
        hidden, deltas = _branches(dense, layers, rows, recipe, out, state, report)
        report(recipe.steps * len(DOMAINS), "routers", None)
        changes = _stacked(deltas)
        model = with_changes(dense, changes, recipe.top_k)
        fitting = [text.float() for own in hidden for text in own[: recipe.fitted]]
        owners = [1 + branch for branch, own in enumerate(hidden) for _ in own[: recipe.fitted]]
        routers = fit_routers(model, layers, fitting, owners, recipe.temperature, recipe.general)
        changes |= {f"layers.{layer}.router": router.cpu() for layer, router in routers.items()}
        with writing(out):
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            write_changes(scratch / CHANGES, changes, recipe.top_k)
            (scratch / RECIPE).write_text(json.dumps(asdict(recipe), indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(state)


def _branches(
    dense: Any, layers: range, rows: list[list[Tensor]], recipe: Recipe, out: Path, state: Path, report: Report
) -> tuple[list[list[Tensor]], list[Deltas]]:
    """Per branch, the hidden states of its texts and its changes in the numbers that a file keeps."""
    from safetensors.torch import load_file, save

    fast: Any = None
    hidden, deltas = [], []
    began = time.monotonic()
    trained = 0
    for branch, (name, own) in enumerate(zip(DOMAINS, rows, strict=True)):
        files = state / f"{branch}.hidden.safetensors", state / f"{branch}.deltas.safetensors"
        if fast is None and not all(file.is_file() for file in files):
            fast = _fast(dense)
        with writing(out):
            report(branch * recipe.steps, f"{name}: lower layers", None)
            hidden.append(kept(fast, layers[0], own, files[0]))
        if not files[1].is_file():

            def step(done: int, loss: float, branch: int = branch, name: str = name, before: int = trained) -> None:
                left = (time.monotonic() - began) / (before + done) * ((len(DOMAINS) - branch) * recipe.steps - done)
                report(branch * recipe.steps + done, f"{name}: loss {loss:.3f}", left)

            learned = train_branch(
                fast,
                layers,
                hidden[-1],
                own,
                rank=recipe.rank,
                batch=recipe.batch,
                scored=recipe.scored,
                steps=recipe.steps,
                lr=recipe.lr,
                seed=recipe.seed * 1_000_003 + branch,
                report=step,
            )
            trained += recipe.steps
            rounded = {key: tensor.bfloat16().contiguous() for key, tensor in learned.items()}
            with writing(out), replacing(files[1]) as stream:
                stream.write(save(rounded))
        deltas.append(load_file(files[1]))
    return hidden, deltas


def _fast(dense: Any) -> Any:
    """The model in bfloat16 where the processor multiplies it: what it computes is only learned from."""
    if not multiplies_16_bit(dense.device, torch.bfloat16):
        return dense
    import copy

    return copy.deepcopy(dense).bfloat16()


def _stacked(deltas: Sequence[Deltas]) -> dict[str, Tensor]:
    """The changes of all branches as `with_changes` takes them."""
    return {f"layers.{key}": torch.stack([own[key] for own in deltas]) for key in deltas[0]}


def _same_recipe(state: Path, recipe: Recipe) -> None:
    file = state / RECIPE
    if not file.is_file():
        with replacing(file) as stream:
            stream.write(json.dumps(asdict(recipe)).encode())
    elif json.loads(file.read_text(encoding="utf-8")) != asdict(recipe):
        raise UserError(f"{state}: was begun with another recipe; finish it with that one, or delete the folder")


def _rows(texts: Sequence[Piece], tokenizer: Any, recipe: Recipe) -> list[list[Tensor]]:
    """Tokens of each branch's texts, as many from each of its domains as there are, drawn with the seed."""
    found = []
    for name, domains in DOMAINS.items():
        draws = random.Random(f"{recipe.seed}/{name}")
        own: list[str] = []
        for domain in domains:
            here = [" " + piece.text for piece in texts if piece.domain == domain]
            own += draws.sample(here, min(len(here), -(-recipe.texts // len(domains))))
        draws.shuffle(own)
        encoded = tokenizer(own)["input_ids"] if own else []
        rows = [torch.tensor(row[: recipe.tokens]) for row in encoded if len(row) > 1]
        if len(rows) < max(recipe.batch, recipe.fitted):
            raise UserError(f"{name}: {len(rows)} texts of the domains {', '.join(domains)} are too few")
        found.append(rows[: recipe.texts])
    return found
