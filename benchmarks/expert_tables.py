"""The tables of `python -m benchmarks.expert_scores`."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hfedmoe.compare.merits import interval
from hfedmoe.method.selection import comparable

TRUTHS = ("kept out", "Adam", "SGD")
REFERENCE = "ib lam=0.5 beta=0.5"
WAYS = ("together", "comparable", "mostly even", "even")


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
    """Markdown. `usual` says how a method spends a budget over the layers by a score."""
    records = found["records"]
    every = _cell([1e3 * record["all experts trained"] for record in records], 2)
    share = f"{found['options']['share']:.0%}"
    parts = [
        _heading(found),
        "Rank correlation with what each expert is worth:",
        _correlations(records, usual),
        f"Loss with the best {share} of the experts over that of the whole model, in nats per token; drop of the loss "
        f"after one step of the best {share} of each layer, in thousandths (all experts: {every}); and how much better "
        "than with `ib` each is:",
        _costs(records),
        "Layer by layer, correlation with the loss without the expert, and with the gain of one Adam step:",
        _layer_by_layer(records, usual),
        "Loss by how the budget is spent, the experts that each layer then has, and what is better in even shares:",
        _spending(records),
    ]
    return "\n\n".join(parts)


def _correlations(records: list[dict[str, Any]], usual: Callable[[str], str]) -> str:
    rows = {}
    for name in records[0]["scores"]:
        of = {truth: [correlations(record, name, truth, usual) for record in records] for truth in TRUTHS}
        rows[name] = [_cell([own[-2] for own in of[truth]]) for truth in TRUTHS]
        rows[name] += [_cell([own[-1] for own in of[truth]]) for truth in ("kept out", "Adam")]
    return _table([*TRUTHS, "all: kept out", "all: Adam"], rows)


def _costs(records: list[dict[str, Any]]) -> str:
    rows: dict[str, list[str]] = {}
    for name in [*records[0]["scores"], "draws"]:
        rows[name] = []
        for way in (None, "even"):
            costs = [_kept(record, name, way) for record in records]
            saved = [_kept(record, REFERENCE, way) - own for record, own in zip(records, costs, strict=True)]
            rows[name] += [_cell(costs), _cell(saved, sign=True)]
        drops = [1e3 * record["found"][name]["trained"] for record in records]
        more = [drop - 1e3 * record["found"][REFERENCE]["trained"] for record, drop in zip(records, drops, strict=True)]
        rows[name] += [_cell(drops, 2), _cell(more, 2, sign=True)]
    return _table(["keep", "better", "keep, even", "better", "train", "better"], rows)


def _layer_by_layer(records: list[dict[str, Any]], usual: Callable[[str], str]) -> str:
    layers, rows = range(len(records[0]["truth"]["kept out"])), {}
    for name in records[0]["scores"]:
        if not name.startswith("ib") or name == REFERENCE:
            both = [[correlations(r, name, truth, usual) for r in records] for truth in ("kept out", "Adam")]
            rows[name] = [_cell([own[layer] for own in one]) for one in both for layer in layers]
    return _table([f"{truth} {layer + 1}" for truth in ("kept out", "Adam") for layer in layers], rows)


def _spending(records: list[dict[str, Any]]) -> str:
    rows = {}
    for name in records[0]["scores"]:
        kept = records[0]["found"][name]["kept"]
        if all(way in kept for way in WAYS):
            costs = {way: [_kept(record, name, way) for record in records] for way in WAYS}
            more = [[one - even for one, even in zip(costs[way], costs["even"], strict=True)] for way in WAYS[:2]]
            counts = [_counts([record["found"][name]["experts"][way] for record in records]) for way in WAYS[:-1]]
            rows[name] = [*map(_cell, costs.values()), *counts, *(_cell(own, sign=True) for own in more)]
    heads = [*WAYS, *(f"{way}, experts" for way in WAYS[:-1]), *(f"even over {way}" for way in WAYS[:2])]
    return _table(heads, rows)


def _table(heads: Sequence[str], rows: dict[str, list[str]]) -> str:
    lines = [f"| score | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    return "\n".join([*lines, *(f"| `{name}` | {' | '.join(cells)} |" for name, cells in rows.items())])


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
