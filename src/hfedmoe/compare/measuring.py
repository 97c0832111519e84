"""What is measured in a cell: the model that all clients share, or, where clients keep their own, every client's.

Where clients keep models of their own, the model on the server is one that nobody has. Measuring all clients on all
rows in every round would cost a round's evaluation once per client. So until the last round each of `C` clients is
measured on every C-th row, each on other rows: together they cost one evaluation. The last round measures every client
on all rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from hfedmoe.data.example import Example
from hfedmoe.prepare import Prepared
from hfedmoe.server.evaluation import Metrics, best
from hfedmoe.server.prior import log_prior, with_prior
from hfedmoe.simulation import Simulation


@dataclass
class Measuring:
    """Measures for the server of a cell (`server.Evaluate`), and remembers what was right in the last evaluation."""

    prepared: Prepared
    simulation: Simulation
    weights: list[int]
    """Each client's rows: what it counts in means over the clients."""
    personal: bool
    """Whether clients keep models of their own."""
    round: Callable[[], int]
    """The round that is running; 0 before the first."""
    last: list[Metrics] = field(default_factory=list)
    """Of each model measured on all test rows last (the shared one, or each client's)."""

    def __call__(self, tensors: dict[str, Tensor], kind: str) -> Metrics:
        """As `server.Evaluate`."""
        rows = self.prepared.task.test if kind == "all" else self.prepared.watch
        if not self.personal or self.round() == 0:
            found = [self.prepared.measure_on(rows, tensors)]
            metrics = found[0]
        else:
            last = self.round() == self.prepared.config.federation.rounds
            parts = [rows] * len(self.weights) if last else stripes(rows, len(self.weights))
            found = [
                self.prepared.measure_on(part, self.simulation.model_of(client, tensors))
                for client, part in enumerate(parts)
            ]
            metrics = mean(found, self.weights, whole=last)
        if kind == "all":
            self.last = [one for one in found if one.examples == len(rows)]
        return metrics


def stripes(rows: Sequence[Example], clients: int) -> list[list[Example]]:
    """Each client's rows: every C-th, or single rows in turn where there are fewer rows than clients."""
    step = min(clients, len(rows))
    return [list(rows[client % step :: step]) for client in range(clients)]


def hits(metrics: Metrics, rows: Sequence[Example], counts: Sequence[int] | None = None) -> list[bool]:
    """Whether the chosen answer of each row is the right one; empty for completions.

    Args:
        counts: a client's rows with each label, whose logarithm it adds to the scores (`server.prior`); None: it does
            not.
    """
    if metrics.predicted is None or metrics.scores is None:
        return []
    if counts is None:
        return [chosen == row.answer for chosen, row in zip(metrics.predicted, rows, strict=True)]
    prior = log_prior(counts)
    chosen = [best(with_prior(own, prior)) for own in metrics.scores]
    return [label == row.answer for label, row in zip(chosen, rows, strict=True)]


def mean(found: Sequence[Metrics], weights: Sequence[int], whole: bool) -> Metrics:
    """Means over models that count `weights`; macro-F1 only of `whole` sets of rows: few rows lack labels."""

    def of(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        return sum(value * weight for value, weight in zip(known, weights, strict=True)) / sum(weights)

    loss = of([one.loss for one in found])
    perplexity = of([one.perplexity for one in found])
    assert loss is not None
    assert perplexity is not None
    return Metrics(
        accuracy=of([one.accuracy for one in found]),
        macro_f1=of([one.macro_f1 for one in found]) if whole else None,
        loss=loss,
        examples=found[0].examples if whole else sum(one.examples for one in found),
        perplexity=perplexity,
    )


def own_mix(correct: Sequence[bool], rows: Sequence[Example], counts: Sequence[int]) -> float:
    """Accuracy under a client's own mix of labels: the recall of each label, weighted by the client's rows with it.

    Labels without test rows are left out; 0 if no label is left.

    Args:
        correct: one per row of `rows`.
        counts: the client's rows with each label.
    """
    by_label: dict[int, list[bool]] = {}
    for right, row in zip(correct, rows, strict=True):
        by_label.setdefault(row.answer, []).append(right)
    known = {label: number for label, number in enumerate(counts) if number and label in by_label}
    total = sum(known.values())
    if not total:
        return 0.0
    return sum(sum(by_label[label]) / len(by_label[label]) * number for label, number in known.items()) / total
