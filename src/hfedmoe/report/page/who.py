"""Who took part with what, what the experts did, and how rows were split: the middle of a page."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hfedmoe.report.page.plots import Line, Plot, heat, lines
from hfedmoe.report.page.story import Client, Experts, Story

SHOWN = 60
"""Clients of a figure, at most."""
COLLAPSED = 0.25
"""A layer that really uses less than this share of the experts that it used in the first round has collapsed."""


def client_rows(clients: Sequence[Client]) -> list[dict[str, Any]]:
    """The table of clients: numbers to sort by, and texts to read."""
    return [
        {
            "name": client.name,
            "rows": client.rows,
            "rounds": client.rounds,
            "held": client.resident,
            "trained": client.trained,
            "total": client.total,
            "down": client.bytes_down,
            "up": client.bytes_up,
            "peak": client.peak,
            "seconds": client.seconds,
            "first": client.first_loss,
            "last": client.last_loss,
            "left_out": "; ".join(f"{reason} ({times})" for reason, times in client.left_out.most_common()),
        }
        for client in clients
    ]


def expert_plots(experts: Experts, names: dict[int, str]) -> list[Plot]:
    """Heat maps of layers and experts over the whole run, and how training and routing went on."""
    layers = [f"layer {index}" for index in range(experts.usage.shape[1])]
    numbers = [str(index) for index in range(experts.usage.shape[2])]
    axes = ("expert", "layer")
    made = [
        heat(f"Experts {word}", values.mean(0), numbers, layers, (*axes, value), note, share)
        for word, values, value, note, share in (
            ("held", experts.held, "share of clients", "Mean over rounds of the clients that held an expert.", True),
            ("trained", experts.trained, "share of clients", "Mean over rounds of the clients that trained it.", True),
            ("used", experts.usage, "usage", "Mean routing probability on the clients' rows.", False),
            ("of importance", experts.importance, "importance", "Mean importance to the clients.", False),
        )
    ]
    rounds = [float(round) for round in experts.rounds]
    never = Line("experts", rounds, experts.never.tolist())
    made.append(lines("Experts that nobody has trained yet", "round", "experts", [never]))
    drift = [Line("between clients", rounds, experts.apart.tolist())]
    if len(rounds) > 1:
        drift.append(Line("from the round before", rounds[1:], experts.moved.tolist()))
    note = "Total variation: 0 is the same routing, 1 means that no token goes to the same experts."
    made.append(lines("How far routing moves", "round", "distance", drift, note))
    if len(experts.clients) > 1:
        made.append(_overlap(experts, names))
    return made


def _overlap(experts: Experts, names: dict[int, str]) -> Plot:
    held = experts.last_held[:SHOWN].astype(np.float32)
    both = held @ held.T
    sizes = held.sum(1)
    either = sizes[:, None] + sizes[None] - both
    labels = [names.get(number, f"client {number}") for number in experts.clients[:SHOWN]]
    note = "Of the experts that either of two clients held in the last round, the share that both held." + (
        f" The first {SHOWN} clients." if len(experts.clients) > SHOWN else ""
    )
    axes = ("client", "other client", "share")
    return heat("How much clients overlap", both / np.maximum(1, either), labels, labels, axes, note, True, 1.0)


def alarms(experts: Experts) -> list[str]:
    """What is wrong with the routing, in sentences; nothing if all is well."""
    first, last = experts.effective[0], experts.effective[-1]
    found = [
        f"Layer {layer} has collapsed: it really uses {end:.1f} experts; in the first round it used {begin:.1f}."
        for layer, (begin, end) in enumerate(zip(first, last, strict=True))
        if end < COLLAPSED * begin
    ]
    never = int(experts.never[-1])
    if never:
        exists = int((~np.isnan(experts.usage[0])).sum())
        found.append(f"{never} of {exists} experts were trained by nobody: they are as in the base model.")
    return found


def split_plot(story: Story) -> Plot | None:
    """Which labels each client's rows have; None if only the devices know."""
    parts = [part for part in story.about.parts if part.labels]
    if not parts or not story.about.labels:
        return None
    table = np.array([part.labels for part in parts[:SHOWN]], float)
    shares = table / np.maximum(1, table.sum(1, keepdims=True))
    rows = [f"{part.name} ({part.rows} rows)" for part in parts[:SHOWN]]
    note = "" if len(parts) <= SHOWN else f"The first {SHOWN} of {len(parts)} clients."
    axes = ("label", "client", "share of its rows")
    return heat("Labels of each client's rows", shares, story.about.labels, rows, axes, note, True, 1.0)
