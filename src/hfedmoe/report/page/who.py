"""Who took part with what, what the experts did, and how rows were split: the middle of a page."""

from collections.abc import Callable, Sequence

import numpy as np

from hfedmoe.report.page.plots import Line, Plot, heat, lines
from hfedmoe.report.page.story import Client, Experts, Story
from hfedmoe.report.page.tables import Cell, Column, Table, count, duration, number, size, table

SHOWN = 60
"""Clients of a figure, at most."""
COLLAPSED = 0.25
"""A layer that really uses less than this share of its experts has collapsed."""
ALONE = 1.2
"""So has one that really uses less than so many: nearly all goes to one expert."""


def client_table(clients: Sequence[Client]) -> Table:
    """One row per client: what it has, what it did, what it cost, and why it was left out."""
    measured = any(client.measured for client in clients)
    return table(
        clients,
        [
            Column("client", lambda client: Cell(client.name)),
            Column("rows", lambda client: count(client.rows)),
            Column("budget", _budget),
            Column("rounds", lambda client: count(client.rounds)),
            Column("held", _told(lambda client: Cell(f"{client.resident}/{client.total}", client.resident))),
            Column("trained", _told(lambda client: count(client.trained))),
            Column("received", lambda client: size(client.bytes_down)),
            Column("sent", lambda client: size(client.bytes_up)),
            Column("peak" if measured else "peak (predicted)", _told(lambda client: size(client.peak))),
            Column("time", _told(lambda client: duration(client.seconds))),
            Column("loss, first round", lambda client: number(client.first_loss)),
            Column("loss, last round", lambda client: number(client.last_loss)),
            Column("left out, and why", _left_out),
        ],
    )


def _told(cell: Callable[[Client], Cell]) -> Callable[[Client], Cell]:
    """What is known only of a client that completed a round."""
    return lambda client: cell(client) if client.rounds else Cell()


def _budget(client: Client) -> Cell:
    """Experts over all layers, and their share of all."""
    if client.budget is None:
        return Cell()
    share = f" ({100 * client.budget / client.total:.0f} %)" if client.total else ""
    return Cell(f"{client.budget}{share}", client.budget)


def _left_out(client: Client) -> Cell:
    reasons = "; ".join(f"{reason} ({times})" for reason, times in client.left_out.most_common())
    return Cell(reasons, sum(client.left_out.values()), "text")


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
    made.append(lines("Experts that nobody has trained yet", "round", "experts", [never], whole=True))
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
    found = []
    sizes = (~np.isnan(experts.usage[0])).sum(-1)
    for layer, (num, begin, end) in enumerate(zip(sizes, experts.effective[0], experts.effective[-1], strict=True)):
        least = _least(int(num))
        if end < least:
            first = f"in the first round it used {begin:.1f}"
            then = "it was so in the first round already" if begin < least else first
            found.append(f"Layer {layer} has collapsed: it really uses {end:.1f} of {num} experts; {then}.")
    never = int(experts.never[-1])
    if never:
        found.append(f"{never} of {sizes.sum()} experts were trained by nobody: they are as in the base model.")
    return found


def _least(num_experts: int) -> float:
    """Experts that a layer really uses, at least, if it has not collapsed; with one there is nothing to collapse."""
    return max(COLLAPSED * num_experts, ALONE) if num_experts > 1 else 0.0


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
