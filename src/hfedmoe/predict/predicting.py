"""Name the label of every row of a file, with the scores by which the run was measured."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from hfedmoe.config import RunConfig, load_config
from hfedmoe.data.known import known_set
from hfedmoe.data.rows import Rows
from hfedmoe.data.tasks import labels_of_run
from hfedmoe.data.unlabelled import load_unlabelled
from hfedmoe.errors import UserError
from hfedmoe.events import Watcher
from hfedmoe.export.task_file import read_task
from hfedmoe.measure import measure_model, measure_run
from hfedmoe.predict.shares import prior_of
from hfedmoe.predict.written import Columns, write
from hfedmoe.server.evaluation import best
from hfedmoe.server.prior import probabilities, with_prior

PREDICTED, PROBABILITY = "predicted", "p_"
"""Column of the label, and the beginning of the columns of probabilities, one for each label."""
SHOWN = 12
"""Labels in the line that says how often each was predicted."""


@dataclass(frozen=True)
class Asked:
    """What `hfedmoe predict` was asked."""

    target: Path
    """A run folder, or an export."""
    file: Path
    out: Path
    checkpoint: str = "best"
    """Of a run."""
    label_shares: str | None = None
    overrides: list[str] | None = None


def predict(asked: Asked, watcher: Watcher) -> str:
    """Write the rows of the file with a label and probabilities for each; returns one line that says so.

    Raises:
        UserError: the target has no labels, the file cannot be read or has no text, or the result cannot be written.
    """
    of_run = (asked.target / "config.toml").is_file()
    if of_run:
        config = load_config(asked.target / "config.toml", asked.overrides)
    else:
        config = read_task(asked.target, asked.overrides)
    watcher.phase("reading the rows")
    labels = _labels(asked.target, config)
    rows, task = load_unlabelled(asked.file, config.data, labels)
    added = [PREDICTED, *(PROBABILITY + label for label in labels)]
    taken = next((name for name in added if name in rows.names), None)
    if taken is not None:
        raise UserError(f'{asked.file}: has a column "{taken}" already; rename it')
    prior = [0.0] * len(labels)
    if asked.label_shares is not None:
        prior = prior_of(asked.label_shares, config.data, labels)
    if of_run:
        metrics = measure_run(asked.target, asked.checkpoint, task, config, watcher)
    else:
        metrics = measure_model(str(asked.target), task, config, watcher)
    assert metrics.scores is not None
    scores = [with_prior(own, prior) for own in metrics.scores]
    chosen = [labels[best(own)] for own in scores]
    write(asked.out, _columns(rows, chosen, labels, [probabilities(own) for own in scores]))
    counts = Counter(chosen).most_common()
    told = ", ".join(f"{label} {count}" for label, count in counts[:SHOWN])
    more = f" and {len(counts) - SHOWN} more labels" if len(counts) > SHOWN else ""
    return f"{asked.out}: {len(rows)} rows ({told}{more})"


def _labels(target: Path, config: RunConfig) -> tuple[str, ...]:
    known = known_set(config.data)
    kind = config.data.format if known is None else known.kind
    if kind in ("choices", "completion"):
        raise UserError(
            f"{target}: its task is {kind}, so there are no labels to name; `hfedmoe evaluate` measures it, and "
            "`hfedmoe export` writes it with code that prompts it"
        )
    labels = labels_of_run(config.data, config.partition, config.seed)
    if not labels:
        raise UserError(f"{target}: its rows have no labels to name")
    return labels


def _columns(rows: Rows, chosen: list[str], labels: tuple[str, ...], shares: list[list[float]]) -> Columns:
    columns = {name: rows.columns[name] for name in rows.names} | {PREDICTED: chosen}
    for number, label in enumerate(labels):
        columns[PROBABILITY + label] = [round(own[number], 6) for own in shares]
    return columns
