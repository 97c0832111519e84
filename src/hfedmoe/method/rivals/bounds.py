"""Limits to compare methods with: every client by itself, clients without limits, and all rows in one place."""

from dataclasses import replace

from hfedmoe.method.holding import every, hold_best
from hfedmoe.method.rivals.fedavg import FEDAVG
from hfedmoe.method.row import EVERYTHING
from hfedmoe.method.selection import activation

LOCAL = replace(
    FEDAVG,
    holds="the experts that are worth most to it, within its budget",
    trains="what its data reach",
    travels="nothing",
    server="nothing: every client keeps a model of its own",
    source="-",
    status="bound",
    hold=hold_best,
    train=activation,
    score=lambda settings: settings.score,
    sends="trained",
    private=EVERYTHING,
)
UNLIMITED = replace(
    FEDAVG,
    holds="everything, whatever its budget",
    source="-",
    status="bound",
    hold=lambda o, s: every(o),
    unlimited=True,
)
POOLED = replace(
    UNLIMITED,
    holds="everything; there is one client with the rows of all",
    trains="everything, as many steps as all clients together",
    server="takes it over",
    pooled=True,
)
