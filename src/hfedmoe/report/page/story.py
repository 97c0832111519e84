"""Everything that a page tells of one run, read from its folder."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hfedmoe.config import RunConfig
from hfedmoe.events import Personal, SiteGain
from hfedmoe.runs import about
from hfedmoe.runs.about import About
from hfedmoe.runs.folder import RunFolder
from hfedmoe.server.intervals import share_interval


@dataclass
class Point:
    """The model after a round; round 0 is the model before training."""

    round: int
    bytes: int
    """Sent both ways, by all clients, since the run began."""
    seconds: float
    """Of all rounds so far."""
    watch: dict[str, Any] | None = None
    """Figures on the watched rows, by name."""
    all: dict[str, Any] | None = None
    """Figures on all held-out rows."""

    def interval(self, kind: str) -> tuple[float, float] | None:
        """Of the accuracy on rows of a kind ("watch" or "all"), with 95 % confidence; None: there is no accuracy."""
        figures = getattr(self, kind)
        if figures is None or figures.get("accuracy") is None:
            return None
        return share_interval(round(figures["accuracy"] * figures["examples"]), figures["examples"])


@dataclass
class Client:
    """One client over all rounds."""

    number: int
    name: str
    rows: int = 0
    budget: int | None = None
    """Experts over all layers, as it told last; None: unknown, as in runs of earlier versions."""
    rounds: int = 0
    """With a valid update."""
    resident: int = 0
    """Experts that it held in its last round."""
    trained: int = 0
    total: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    peak: int = 0
    measured: bool = False
    """Whether the peak was measured; else it is predicted."""
    seconds: float = 0.0
    first_loss: float | None = None
    """The mean over the steps of its first round."""
    last_loss: float | None = None
    """The same of its last round."""
    left_out: Counter[str] = field(default_factory=Counter)
    """How often it gave no valid update, by reason."""


@dataclass
class Experts:
    """What happened to the experts: over rounds T, layers L and experts E; NaN where a layer has fewer experts."""

    rounds: list[int]
    usage: np.ndarray
    """float32 [T, L, E], mean over the clients of a round."""
    importance: np.ndarray
    held: np.ndarray
    """Share of the clients of a round that held the expert, [T, L, E]."""
    trained: np.ndarray
    apart: np.ndarray
    """[T], how far apart the clients' routing is: mean distance of total variation to their mean, 0 to 1."""
    clients: list[int]
    """Of the last round, as the next."""
    last_held: np.ndarray
    """bool [C, L * E]."""

    @property
    def moved(self) -> np.ndarray:
        """[T - 1], distance of total variation between the mean routing of one round and the next, over layers."""
        shares = _shares(self.usage)
        return np.nanmean(0.5 * np.nansum(np.abs(np.diff(shares, axis=0)), -1), -1)

    @property
    def never(self) -> np.ndarray:
        """[T], experts that nobody has trained up to each round."""
        exists = ~np.isnan(self.usage[0])
        so_far = np.logical_or.accumulate(self.trained > 0, axis=0)
        return (exists & ~so_far).reshape(len(self.rounds), -1).sum(-1)

    @property
    def effective(self) -> np.ndarray:
        """[T, L], the exponential of the entropy of the mean usage: how many experts a layer really uses."""
        shares = _shares(self.usage)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(shares > 0, shares * np.log(shares), 0.0)
        return np.exp(-np.nansum(terms, -1))


@dataclass
class Story:
    """One run."""

    path: Path
    config: RunConfig
    settings: str
    """The text of config.toml: all settings and versions."""
    about: About
    points: list[Point]
    clients: list[Client]
    short: list[int]
    """Rounds with fewer valid updates than asked."""
    failed: list[int]
    experts: Experts | None
    answers: list[tuple[int, list[int]]]
    sites: list[SiteGain]
    """What each site gained; empty: not measured, or the run goes on."""
    personal: tuple[int, list[Personal]] | None
    """The last round after which clients measured the model on rows of their own, and what they found."""

    @property
    def whole(self) -> list[Point]:
        """Measured on all held-out rows."""
        return [point for point in self.points if point.all is not None]

    @property
    def before(self) -> Point | None:
        """The model before training, on all held-out rows; None: not measured."""
        return next((point for point in self.whole if point.round == 0), None)

    @property
    def after(self) -> Point | None:
        """The model of the last round that was measured on all held-out rows; None: none was, after training."""
        return next((point for point in reversed(self.whole) if point.round > 0), None)


def read_story(path: Path) -> Story:
    """Read a run. Raises UserError if the folder is not that of a run or is damaged."""
    folder = RunFolder.open(path)
    known = about.read(path)
    names = {part.client: part.name for part in known.parts}
    points: list[Point] = []
    clients = {part.client: Client(part.client, part.name, part.rows, part.budget) for part in known.parts}
    short, failed = [], []
    sites: list[dict[str, Any]] = []
    personal = None
    sent, seconds = 0, 0.0
    for line in folder.iter_rounds():
        sent += line.get("bytes_down", 0) + line.get("bytes_up", 0)
        seconds += line.get("seconds") or 0.0
        found = line["evaluation"]
        points.append(Point(line["round"], sent, seconds, _figures(found, "watch"), _figures(found, "all")))
        sites = line.get("sites", sites)
        if line.get("personal"):
            personal = line["round"], [Personal.from_json(entry) for entry in line["personal"]]
        if line.get("short"):
            short.append(line["round"])
        if line.get("failed"):
            failed.append(line["round"])
        for row in line["clients"]:
            number = row["client"]
            _count(clients.setdefault(number, Client(number, names.get(number, f"client {number}"))), row)
    experts = _experts(folder.read_expert_rows())
    return Story(
        path,
        folder.config,
        (path / "config.toml").read_text(encoding="utf-8"),
        known,
        points,
        [clients[number] for number in sorted(clients)],
        short,
        failed,
        experts,
        about.answers(path),
        [SiteGain.from_json(site) for site in sites],
        personal,
    )


def _figures(found: dict[str, Any], kind: str) -> dict[str, Any] | None:
    """Of an evaluation. Its loss is the one that was trained, as on screen."""
    figures = found.get(kind)
    if figures is None or figures.get("choice_loss") is None:
        return figures
    return figures | {"loss": figures["choice_loss"]}


def _count(client: Client, row: dict[str, Any]) -> None:
    if row["status"] != "ok":
        reason = row.get("reason")
        client.left_out[f"{row['status']}: {reason}" if reason else row["status"]] += 1
        return
    client.rounds += 1
    client.rows = client.rows or row.get("examples") or 0
    client.resident, client.trained, client.total = row["resident"], row["trained"], row["total_experts"]
    client.bytes_down += row.get("bytes_down") or 0
    client.bytes_up += row.get("bytes_up") or 0
    client.peak = max(client.peak, row.get("peak_bytes") or 0)
    client.measured = bool(row.get("peak_is_measured"))
    client.seconds += row.get("seconds") or 0.0
    # A client's loss is the mean over its steps; earlier versions kept only the last.
    client.last_loss = row.get("last_loss") if row.get("mean_loss") is None else row["mean_loss"]
    client.first_loss = client.last_loss if client.first_loss is None else client.first_loss


def _experts(rows: np.ndarray | None) -> Experts | None:
    """The table of experts.npy, summed up round by round: few rows are in memory at once."""
    if rows is None or not len(rows):
        return None
    rounds, starts = np.unique(rows["round"], return_index=True)
    usage, importance, held, trained, apart = [], [], [], [], []
    block = rows[:1]
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        block = rows[start:end]
        exists = ~np.isnan(block["usage"][0])
        mean = block["usage"].mean(0)
        usage.append(mean)
        importance.append(block["importance"].mean(0))
        held.append(np.where(exists, block["resident"].mean(0), np.nan))
        trained.append(np.where(exists, block["trained"].mean(0), np.nan))
        own, together = _shares(block["usage"]), _shares(mean)
        apart.append(float(np.nanmean(0.5 * np.nansum(np.abs(own - together), -1))))
    return Experts(
        rounds.tolist(),
        np.stack(usage),
        np.stack(importance),
        np.stack(held),
        np.stack(trained),
        np.array(apart),
        block["client"].tolist(),
        block["resident"].reshape(len(block), -1),
    )


def _shares(usage: np.ndarray) -> np.ndarray:
    """Usage [..., L, E] as shares that sum to 1 in every layer."""
    total = np.nansum(usage, -1, keepdims=True)
    return usage / np.where(total > 0, total, 1.0)
