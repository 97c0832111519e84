"""How good the model is for the clients, of whom the worst, the median and the best are shown."""

import statistics
from collections.abc import Sequence

from hfedmoe.events import Personal
from hfedmoe.report.words import decimal, percent

Extreme = tuple[str, str, str]
"""Which client, its figure, and what else is known of it."""


def extremes(found: Sequence[Personal]) -> list[float]:
    """The figure of the worst, the median and the best client: accuracy as a share, or the loss without choices."""
    figures = sorted(_figure(one) for one in found)
    if found[0].accuracy is None:
        figures.reverse()  # the largest loss is the worst
    return [figures[0], statistics.median(figures), figures[-1]]


def personal_line(found: Sequence[Personal]) -> str:
    """All three in a line: `clients' own rows: worst 12.0, median 40.1, best 77.0 %`."""
    if found[0].accuracy is None:
        worst, median, best = (decimal(figure) for figure in extremes(found))
        return f"clients' own rows: loss, worst {worst}, median {median}, best {best}"
    worst, median, best = (f"{100 * figure:.1f}" for figure in extremes(found))
    return f"clients' own rows: worst {worst}, median {median}, best {best} %"


def personal_cards(found: Sequence[Personal]) -> list[Extreme]:
    """Of each of the three its name, its figure, and the client that it is of, with the shared model's figure."""
    shown = decimal if found[0].accuracy is None else percent
    cards = []
    for name, figure in zip(("worst client", "median client", "best client"), extremes(found), strict=True):
        one = next((one for one in found if _figure(one) == figure), None)
        shared = None if one is None else one.shared_loss if one.accuracy is None else one.shared_accuracy
        of = f"of {len(found)}" if one is None else one.name
        cards.append((name, shown(figure), of + ("" if shared is None else f"; all experts: {shown(shared)}")))
    return cards


def _figure(one: Personal) -> float:
    return one.loss if one.accuracy is None else one.accuracy
