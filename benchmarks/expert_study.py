"""All that is measured of one client; part of `python -m benchmarks.expert_scores`."""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.expert_clients import Client
from benchmarks.expert_steps import Steps
from benchmarks.expert_tables import REFERENCE
from benchmarks.expert_worth import Layers, Texts, gains, kept, leave_one_out, losses, on_device, trained
from hfedmoe.method.running import RunningScore
from hfedmoe.method.scores import SCORES, Evidence, score
from hfedmoe.method.selection import comparable, even_shares, select
from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.routing.tokens import TokenMasks
from hfedmoe.seeds import generator

Scored = Callable[[Evidence], Tensor]
"""Evidence of one batch about one layer -> [E]."""
LAMS, BETAS = (0.0, 0.5, 1.0), (-1.0, -0.5, 0.0, 0.5, 1.0)
DRAWS = 4
LR = 2e-3
Spend = Callable[[Layers, int, int], list[Tensor]]
"""(scores, budget over all layers, top-k) -> bool [E] per layer."""


def _even(scores: Layers, budget: int, top_k: int) -> list[Tensor]:
    return select(comparable(scores), budget, even_shares([len(layer) for layer in scores], budget, top_k))


def _mostly_even(scores: Layers, budget: int, top_k: int) -> list[Tensor]:
    """Three quarters of the budget in even shares, the rest for the best of all layers."""
    return select(comparable(scores), budget, even_shares([len(layer) for layer in scores], 3 * budget // 4, top_k))


SPENDS: dict[str, Spend] = {
    "together": lambda scores, budget, top_k: select(scores, budget, top_k),
    "comparable": lambda scores, budget, top_k: select(comparable(scores), budget, top_k),
    "mostly even": _mostly_even,
    "even": _even,
}
"""Ways to spend a budget over all layers: `method.layers`, and between them."""


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
    return "comparable" if row is not None and row.by_layer else "together"


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
            "trained": trained(held_out, adam, chosen["even"]),
            "experts": {way: [int(own.sum()) for own in residents] for way, residents in chosen.items()},
        }

    def ways(name: str) -> list[str]:
        swept = name.startswith("ib") and name != REFERENCE
        return [usual(name), "even"] if swept else [usual(name), *(way for way in SPENDS if way != usual(name))]

    found = {name: costs(layers, ways(name)) for name, layers in named.items()}
    random = [costs(layers, ["together", "even"]) for layers in drawn]
    found["draws"] = {
        "kept": {way: fmean(one["kept"][way] for one in random) for way in ("together", "even")},
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


def scores(model: MoEModel, rows: Sequence[Tensor], batch: int, scored: dict[str, Scored]) -> dict[str, Layers]:
    """Scores by name, each the mean over the batches of the client's rows, as `ClientHistory` keeps it.

    The backward passes leave the mean gradient over all batches in the trained tensors.
    """
    running = {name: [RunningScore(number) for number in model.num_experts] for name in scored}
    batches = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    for parameter in model.parameters():
        parameter.grad = None
    for own in batches:
        tokens, mask = on_device(model, own)
        model.watch(TokenMasks(mask), "activation", "taylor", "ghost")
        (losses(model, tokens, mask).mean() / len(batches)).backward()
        for layer, routing in enumerate(model.routing):
            assert routing.evidence is not None
            for name, of in scored.items():
                running[name][layer].update(of(routing.evidence).cpu())
    model.watch(None)
    return {name: [one.value() for one in layers] for name, layers in running.items()}
