"""The tables of `python -m benchmarks.expert_scores`."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hfedmoe.compare.merits import interval
from hfedmoe.method.selection import comparable

TRUTHS = ("kept out", "Adam", "SGD")
REFERENCE = "ib lam=0.5 beta=0.5"
WAYS = ("as they are", "comparable", "mostly equal", "equal")


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Spearman's; None if one side is constant."""
    from scipy.stats import spearmanr

    if len(set(left)) < 2 or len(set(right)) < 2:
        return None
    return float(spearmanr(left, right).statistic)


def correlations(record: dict[str, Any], name: str, truth: str, usual: Callable[[str], str]) -> list[float | None]:
    """Of one client: each layer's, their mean, and that over the experts of all layers."""
    layers, true = record["scores"][name], record["truth"][truth]
    found = [rank_correlation(own, other) for own, other in zip(layers, true, strict=True)]
    known = [value for value in found if value is not None]
    flat = [torch.tensor(layer) for layer in layers]
    if usual(name) == "comparable":
        flat = comparable(flat)
    everything = rank_correlation(torch.cat(flat).tolist(), [value for layer in true for value in layer])
    return [*found, sum(known) / len(known) if known else None, everything]


def tables(found: dict[str, Any], usual: Callable[[str], str]) -> str:
    """Markdown."""
    records = found["records"]
    names = list(records[0]["scores"])
    layers = len(records[0]["truth"]["kept out"])
    lines = [
        _heading(found),
        "",
        "Rank correlation with what each expert is worth, and what the best quarter costs:",
        "",
    ]
    heads = [
        *TRUTHS,
        "all: kept out",
        "all: Adam",
        "keep",
        "less than `ib`",
        "keep, equal",
        "less than `ib`, equal",
        "train",
    ]
    lines += [f"| score | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for name in [*names, "draws"]:
        cells = []
        if name in names:
            of = {truth: [correlations(record, name, truth, usual) for record in records] for truth in TRUTHS}
            cells += [_cell([own[layers] for own in of[truth]]) for truth in TRUTHS]
            cells += [_cell([own[layers + 1] for own in of[truth]]) for truth in ("kept out", "Adam")]
        else:
            cells += ["-"] * 5
        for way in (None, "equal"):
            costs = [_kept(record, name, way) for record in records]
            saved = [_kept(record, REFERENCE, way) - own for record, own in zip(records, costs, strict=True)]
            cells += [_cell(costs), _cell(saved, sign=True)]
        cells.append(_cell([1e3 * record["found"][name]["trained"] for record in records], 2))
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    every = _cell([1e3 * record["all experts trained"] for record in records], 2)
    lines += ["", f"Losses are nats per token, those of training thousandths. All experts trained: {every}.", ""]
    lines += ["Layer by layer, correlation with the loss without the expert, and with the gain of one Adam step:", ""]
    columns = [f"{truth} {layer + 1}" for truth in ("kept out", "Adam") for layer in range(layers)]
    lines += [f"| score | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name in names:
        if not name.startswith("ib") or name == REFERENCE:
            both = [[correlations(r, name, truth, usual) for r in records] for truth in ("kept out", "Adam")]
            cells = [_cell([own[layer] for own in one]) for one in both for layer in range(layers)]
            lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += [
        "",
        "Loss with the best quarter by how the budget is spent, and the experts that each layer then has:",
        "",
    ]
    lines += [
        f"| score | {' | '.join(WAYS)} | {' | '.join(f'{way}, experts' for way in WAYS)} |",
        f"|---|{'---|' * 2 * len(WAYS)}",
    ]
    for name in names:
        if all(way in records[0]["found"][name]["kept"] for way in WAYS):
            cells = [_cell([record["found"][name]["kept"][way] for record in records]) for way in WAYS]
            counts = [_counts([record["found"][name]["experts"][way] for record in records]) for way in WAYS]
            lines.append(f"| `{name}` | {' | '.join([*cells, *counts])} |")
    return "\n".join(lines)


def _heading(found: dict[str, Any]) -> str:
    where, options, records = found["machine"], found["options"], found["records"]
    kind = "of one domain each" if options["alpha"] is None else f"with Dirichlet {options['alpha']:g} over the domains"
    loss = sum(record["loss"] for record in records) / len(records)
    return (
        f"{found['model']} (weights {found['digest'][:12]}), "
        f"{options['clients']} clients {kind}, {options['seeds']} seed(s), "
        f"{options['own']} own and {options['held_out']} held-out texts; loss {loss:.3f}. {where['processor']}, "
        f"{where['torch_threads']} thread(s), torch {where['torch']}, {found['seconds']:.0f} s."
    )


def _kept(record: dict[str, Any], name: str, way: str | None) -> float:
    """With the budget spent in this way; None: as a method spends it, which is the first way."""
    kept = record["found"][name]["kept"]
    return float(next(iter(kept.values())) if way is None else kept[way])


def _cell(values: Sequence[float | None], digits: int = 3, sign: bool = False) -> str:
    own = interval([value for value in values if value is not None and math.isfinite(value)])
    if own is None:
        return "-"
    mean = f"{own.mean:+.{digits}f}" if sign else f"{own.mean:.{digits}f}"
    return mean if own.half is None else f"{mean} ± {own.half:.{digits}f}"


def _counts(counts: list[list[int]]) -> str:
    return " ".join(f"{sum(own) / len(own):.1f}" for own in zip(*counts, strict=True))
