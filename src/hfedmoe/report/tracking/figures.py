"""The figures of a round, by the names that they have in trackers."""

import math
from collections.abc import Iterable
from typing import Any

from hfedmoe.events import ClientRound, Personal
from hfedmoe.report.personal import extremes

Figures = dict[str, float]
SECONDS = {
    "seconds": "round",
    "seconds_planning": "planning",
    "seconds_training": "training",
    "seconds_evaluation": "evaluation",
}
OF_CLIENT = {
    "mean_loss": "loss",
    "first_loss": "first_loss",
    "last_loss": "last_loss",
    "steps": "steps",
    "seconds": "seconds",
    "peak_bytes": "peak_bytes",
    "resident": "held_experts",
    "trained": "trained_experts",
    "activation": "activation",
    "routing_consistency": "routing_consistency",
}
"""Of a client with a valid update: the names under `client/<number>/`."""


def bytes_of(line: dict[str, Any]) -> int:
    """Of all messages of a round."""
    return int(line.get("bytes_down", 0) + line.get("bytes_up", 0))


def of_round(line: dict[str, Any], clients: Iterable[ClientRound], every_client: bool, bytes_before: int) -> Figures:
    """The figures of a line of metrics.jsonl; what is unknown or not finite is left out.

    Args:
        clients: of the round, read once, so that they need not fit into memory.
        every_client: also the series of every client.
        bytes_before: of all earlier rounds.
    """
    found: dict[str, Any] = {}
    for rows, figures in line.get("evaluation", {}).items():
        found |= {f"{rows}/{name}": value for name, value in figures.items() if name != "examples"}
    found |= {f"bytes/{way}": line.get(f"bytes_{way}") for way in ("down", "up")}
    found["bytes/total"] = bytes_before + bytes_of(line)
    found |= {f"seconds/{name}": line.get(key) for key, name in SECONDS.items()}
    if line.get("personal"):
        own = extremes([Personal.from_json(entry) for entry in line["personal"]])
        found |= dict(zip(("personal/worst", "personal/median", "personal/best"), own, strict=True))
    found |= {f"phase/{name}": value for name, value in line.get("seconds_by_phase", {}).items()}
    over = _Clients()
    for done in clients:
        over.add(done)
        if every_client:
            found |= _of_client(done)
    return _known(found | over.figures())


def _of_client(done: ClientRound) -> dict[str, Any]:
    found: dict[str, Any] = {"ok": done.status == "ok", "bytes_down": done.bytes_down, "bytes_up": done.bytes_up}
    if done.status == "ok":
        found |= {name: getattr(done, field) for field, name in OF_CLIENT.items()}
    return {f"client/{done.client}/{name}": value for name, value in found.items()}


class _Clients:
    """Sums over the clients of a round."""

    def __init__(self) -> None:
        self.ok = self.left_out = self.steps = self.held = self.trained = self.total_experts = self.peak_bytes = 0
        self.loss = self.weight = self.consistency = self.slowest = 0.0
        self.consistent = 0
        """How many have a routing consistency."""

    def add(self, done: ClientRound) -> None:
        """Count a client."""
        if done.status != "ok":
            self.left_out += 1
            return
        self.ok += 1
        self.steps += done.steps
        self.held += done.resident
        self.trained += done.trained
        self.total_experts = done.total_experts
        self.peak_bytes = max(self.peak_bytes, done.peak_bytes)
        self.slowest = max(self.slowest, done.seconds)
        if done.mean_loss is not None:
            self.loss += done.weight * done.mean_loss
            self.weight += done.weight
        if done.routing_consistency is not None:
            self.consistency += done.routing_consistency
            self.consistent += 1

    def figures(self) -> dict[str, Any]:
        """By name; nothing where no client was asked (round 0)."""
        if not self.ok + self.left_out:
            return {}
        found: dict[str, Any] = {"clients/ok": self.ok, "clients/left_out": self.left_out}
        if self.ok:
            found |= {
                "train/loss": self.loss / self.weight if self.weight else None,
                "train/steps": self.steps,
                "train/routing_consistency": self.consistency / self.consistent if self.consistent else None,
                "experts/held_mean": self.held / self.ok,
                "experts/trained_mean": self.trained / self.ok,
                "experts/total": self.total_experts,
                "clients/peak_bytes_max": self.peak_bytes,
                "clients/seconds_max": self.slowest,
            }
        return found


def of_gains(sites: Iterable[dict[str, Any]], every_client: bool) -> Figures:
    """What the sites gained, from `sites` of a line of metrics.jsonl: no name and no label of a site."""
    sites = list(sites)
    gains = [site["gain"] for site in sites if site["gain"] is not None]
    found: dict[str, Any] = {}
    if gains:
        found = {
            "sites/gain_mean": sum(gains) / len(gains),
            "sites/gain_min": min(gains),
            "sites/gain_max": max(gains),
            "sites/gained": sum(gain > 0 for gain in gains),
            "sites/measured": len(gains),
        }
    tuned = [site["tuning"]["gain"] for site in sites if site.get("tuning") and site["tuning"]["gain"] is not None]
    if tuned:
        found |= {
            "sites/tuning_gain_mean": sum(tuned) / len(tuned),
            "sites/tuning_gain_min": min(tuned),
            "sites/tuning_gain_max": max(tuned),
        }
    for site in sites if every_client else ():
        name = f"client/{site['client']}"
        found[f"{name}/gain"] = site["gain"]
        for model in ("before", "federated", "alone", "own"):
            if site.get(model) is not None:
                found |= _scores(f"{name}/{model}", site[model])
        if site.get("tuning") is not None:
            found[f"{name}/tuning_gain"] = site["tuning"]["gain"]
            found |= _scores(f"{name}/tuned", site["tuning"]["after"])
    return _known(found)


def _scores(name: str, score: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}_{key}": score[key] for key in ("accuracy", "macro_f1", "loss")}


def _known(found: dict[str, Any]) -> Figures:
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}
