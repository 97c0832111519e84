"""Name the label, or the right choice, of every row of a file, with the scores by which the run was measured."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hfedmoe.config import RunConfig, load_config
from hfedmoe.data.kinds import settled_kind
from hfedmoe.data.rows import Rows
from hfedmoe.data.task import Task
from hfedmoe.data.tasks import labels_of_run
from hfedmoe.data.unlabelled import load_unanswered, load_unlabelled
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
INDEX, PROBABILITIES = "predicted_index", "probabilities"
"""Of multiple choice, where `PREDICTED` has the text: columns of the choice's index, and of a list in its order."""
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
    """Write the rows of the file with a label or choice and probabilities for each; returns one line that says so.

    Raises:
        UserError: the target has neither labels nor choices, the file cannot be read or lacks a column, or the result
            cannot be written.
    """
    of_run = (asked.target / "config.toml").is_file()
    if of_run:
        config = load_config(asked.target / "config.toml", asked.overrides)
    else:
        config = read_task(asked.target, asked.overrides)
    watcher.phase("reading the rows")
    kind = settled_kind(config.data)
    if kind == "completion":
        raise UserError(
            f"{asked.target}: its task is completion, so there are no labels to name; `hfedmoe evaluate` measures it, "
            "`hfedmoe chat` answers prompts, and `hfedmoe export` writes it with code that prompts it"
        )
    if kind == "choices":
        return _choices(asked, config, of_run, watcher)
    return _labels(asked, config, of_run, watcher)


def _labels(asked: Asked, config: RunConfig, of_run: bool, watcher: Watcher) -> str:
    labels = labels_of_run(config.data, config.partition, config.seed)
    if not labels:
        raise UserError(f"{asked.target}: its rows have no labels to name")
    rows, task = load_unlabelled(asked.file, config.data, labels)
    _check_free(asked, rows, [PREDICTED, *(PROBABILITY + label for label in labels)])
    prior = [0.0] * len(labels)
    if asked.label_shares is not None:
        prior = prior_of(asked.label_shares, config.data, labels)
    scores = [with_prior(own, prior) for own in _scores(asked, task, config, of_run, watcher)]
    chosen = [labels[best(own)] for own in scores]
    shares = [probabilities(own) for own in scores]
    added: Columns = {PREDICTED: chosen}
    for number, label in enumerate(labels):
        added[PROBABILITY + label] = [round(own[number], 6) for own in shares]
    write(asked.out, _all(rows) | added)
    counts = Counter(chosen).most_common()
    told = ", ".join(f"{label} {count}" for label, count in counts[:SHOWN])
    more = f" and {len(counts) - SHOWN} more labels" if len(counts) > SHOWN else ""
    return f"{asked.out}: {len(rows)} rows ({told}{more})"


def _choices(asked: Asked, config: RunConfig, of_run: bool, watcher: Watcher) -> str:
    if asked.label_shares is not None:
        raise UserError("--label-shares: rows of multiple choice have choices of their own and no labels; leave it out")
    rows, task = load_unanswered(asked.file, config.data)
    _check_free(asked, rows, [PREDICTED, INDEX, PROBABILITIES])
    scores = _scores(asked, task, config, of_run, watcher)
    chosen = [best(own) for own in scores]
    added: Columns = {
        PREDICTED: [example.choices[index] for example, index in zip(task.test, chosen, strict=True)],
        INDEX: chosen,
        PROBABILITIES: [[round(share, 6) for share in probabilities(own)] for own in scores],
    }
    write(asked.out, _all(rows) | added)
    return f"{asked.out}: {len(rows)} rows, each with the choice that is most probable"


def _scores(asked: Asked, task: Task, config: RunConfig, of_run: bool, watcher: Watcher) -> Sequence[tuple[float, ...]]:
    """Of every row, the score of each of its choices."""
    if of_run:
        metrics = measure_run(asked.target, asked.checkpoint, task, config, watcher)
    else:
        metrics = measure_model(str(asked.target), task, config, watcher)
    assert metrics.scores is not None
    return metrics.scores


def _check_free(asked: Asked, rows: Rows, added: Sequence[str]) -> None:
    """Raise UserError if the file has a column that is to be added."""
    taken = next((name for name in added if name in rows.names), None)
    if taken is not None:
        raise UserError(f'{asked.file}: has a column "{taken}" already; rename it')


def _all(rows: Rows) -> Columns:
    return {name: rows.columns[name] for name in rows.names}
