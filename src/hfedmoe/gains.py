"""What did each site gain? Its own rows, which nobody trained on, before the federation, after it, and alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from hfedmoe.client.judging import compared
from hfedmoe.data.kept import class_counts
from hfedmoe.events import Score, SiteGain, Watcher
from hfedmoe.prepare import Prepared
from hfedmoe.server.evaluation import Metrics
from hfedmoe.server.sites import gained, score_of

TensorsOf = Callable[[int], dict[str, Tensor]]
"""A client's number -> the trained tensors of its model."""


@dataclass(frozen=True)
class Sites:
    """The sites of a run: their names, and of each the rows that it trains on and keeps back, as indices."""

    names: list[str]
    trained: list[list[int]]
    kept: list[list[int]]

    @property
    def measurable(self) -> bool:
        """Whether any site kept rows back."""
        return any(self.kept)


def site_gains(
    prepared: Prepared,
    sites: Sites,
    federated: TensorsOf,
    alone: TensorsOf | None,
    held: Mapping[int, list[Tensor]],
    watcher: Watcher,
) -> list[SiteGain]:
    """Measure every site that kept rows back.

    Args:
        federated: the models after the federation.
        alone: the models that the sites trained by themselves; None: they did not.
        held: the experts that each client held last, bool [E] per layer; without those that have no such sub-model.
    """
    task, found = prepared.task, []
    for client, kept in enumerate(sites.kept):
        if not kept:
            continue
        watcher.phase(f"measuring what {sites.names[client]} gained")
        rows = [task.train[row] for row in kept]
        before = prepared.measure_on(rows, prepared.initial)
        after, own = prepared.measure_on(rows, federated(client)), None
        if client in held:
            whole = all(bool(keep.all()) for keep in held[client])
            own = after if whole else prepared.measure_on(rows, federated(client), held=held[client])
        by_itself = None if alone is None else prepared.measure_on(rows, alone(client))
        trained = len(sites.trained[client])
        gain, interval = gained(compared(trained, rows, by_itself or before, after))
        found.append(
            SiteGain(
                client=client,
                name=sites.names[client],
                trained_rows=trained,
                own_rows=len(rows),
                labels=class_counts(task, [*sites.trained[client], *kept]),
                num_labels=len(task.labels),
                before=_score(before),
                federated=_score(after),
                alone=None if by_itself is None else _score(by_itself),
                gain=gain,
                gain_interval=interval,
                own=None if own is None else _score(own),
            )
        )
    return found


def _score(metrics: Metrics) -> Score:
    right = None if metrics.accuracy is None else round(metrics.accuracy * metrics.examples)
    return score_of(right, metrics.examples, metrics.macro_f1, metrics.trained_loss)
