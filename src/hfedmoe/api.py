"""hfedmoe from Python: run a federation, look at what it did, and use its model (docs/python.md).

`import hfedmoe` offers all of this as `hfedmoe.run`, `hfedmoe.open_run` and so on; nothing heavy is imported before one
of them is used.
"""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from hfedmoe import simulation
from hfedmoe.config import RunConfig, config_from_tree
from hfedmoe.config.builtin import load_named
from hfedmoe.errors import UserError
from hfedmoe.events import Silent, Watcher
from hfedmoe.report.words import describe
from hfedmoe.runs.existing import run_at
from hfedmoe.runs.refusals import require_settings

__all__ = ["Experts", "Run", "open_run", "resume", "run"]

Config = RunConfig | Mapping[str, Any] | str | Path


@dataclass(frozen=True)
class Experts:
    """What every client did with every expert: `N` rows, one for each round and client that took part in it.

    `L` is the number of MoE layers and `E` the most experts of a layer.
    """

    rounds: np.ndarray
    """[N] int64, in order."""
    clients: np.ndarray
    """[N] int64."""
    held: np.ndarray
    """[N, L, E] bool: on the client's device."""
    trained: np.ndarray
    """[N, L, E] bool: with at least one step."""
    usage: np.ndarray
    """[N, L, E] float32: how much the client's rows use an expert (docs/method.md); NaN where a layer has fewer."""
    importance: np.ndarray
    """[N, L, E] float32: what an expert is worth to the client; NaN likewise."""


class Run:
    """The folder of a run, of one that has ended or still goes on.

    Args:
        path: the folder.

    Raises:
        UserError: there is no run in the folder, or its config is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        """Its folder."""
        self._folder = run_at(self.path)

    def __repr__(self) -> str:
        rounds = self.metrics
        last = f", {describe_line(rounds[-1])}" if rounds and describe_line(rounds[-1]) else ""
        return (
            f"<Run {self.path}: {rounds[-1]['round'] if rounds else 0} of {self.config.federation.rounds} rounds{last}>"
        )

    @property
    def config(self) -> RunConfig:
        """All settings."""
        return self._folder.config

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rounds so far, the model as it was (round 0) first.

        A round has `round`, `evaluation` (accuracy, macro-F1 and loss on `all` held-out rows, and on the few `watch`ed
        ones: what was measured in it), `bytes_down`, `bytes_up`, `seconds`, and `clients`, with what each of them did;
        `personal`, where clients measured it on rows of their own (`evaluation.personal_every`); the last has `sites`,
        with what each gained. Its `accuracy`, `macro_f1` and `loss` are those of `all`, else of `watch`, else None: not
        one series.
        """
        return self._folder.read_rounds()

    @property
    def experts(self) -> Experts:
        """Which client held, trained and used which expert.

        Raises:
            UserError: no round has ended yet, or the file is damaged.
        """
        rows = self._folder.read_expert_rows()
        if rows is None:
            raise UserError(f"{self.path}: no round has ended yet")
        names = ("round", "client", "resident", "trained", "usage", "importance")
        return Experts(*(np.array(rows[name]) for name in names))

    @property
    def report(self) -> Path:
        """The page with its figures, which any browser opens; written if it is not there.

        Raises:
            UserError: no round has ended yet, or the page cannot be written.
        """
        from hfedmoe.report.page.page import NAME, write_report

        page = self.path / NAME
        return page if page.is_file() else write_report([self.path])

    def model(self, checkpoint: str | int = "best", device: str | None = None) -> Any:
        """The trained model as an ordinary transformers model, with the LoRA terms merged into its weights.

        Args:
            checkpoint: "best", "last" or the number of a round.
            device: as torch names it; None: the one of the run.

        Raises:
            UserError: there is no such checkpoint, or the base model is quantised or has changed.
        """
        from hfedmoe.export.in_memory import trained_model

        return trained_model(self.path, str(checkpoint), device).model

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of its model. Raises UserError if the model is not there any more."""
        from hfedmoe.models.loading import tokenizer_of

        return tokenizer_of(self.config.model)

    def predict(self, texts: Sequence[str], checkpoint: str | int = "best") -> list[dict[str, float]]:
        """The probability of every label for each text, the most probable label first.

        Raises:
            UserError: the task of the run has no labels, or there is no such checkpoint.
        """
        from hfedmoe.predict.answering import open_answerer

        return open_answerer(self.path, str(checkpoint)).label_shares(texts)


def run(
    config: Config = "demo",
    overrides: Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = True,
) -> Run:
    """Fine-tune a model in a federation of simulated clients, as `hfedmoe run` does.

    Args:
        config: the path of a TOML file, the name of a shipped config ("demo", "tiny"), the settings as a tree, or a
            RunConfig.
        overrides: other values for some settings, by `section.key`.
        out: the folder of the run; None: runs/<date>-<name>.
        progress: show what happens; a run of a real model takes minutes or hours.

    Raises:
        UserError: the configuration, model, data or folder cannot be used, or too few clients gave a valid update.

    Example:
        ```python
        import hfedmoe

        run = hfedmoe.run("tiny", {"federation.rounds": 1, "train.steps": 2}, out="first", progress=False)
        before, after = (run.metrics[round]["evaluation"]["all"] for round in (0, -1))
        print(before["accuracy"], after["accuracy"])
        print(run.experts.trained.sum(axis=(1, 2)), "experts trained by each client")
        model = run.model()  # an ordinary transformers model
        print(run.report)
        ```
    """
    settings = settings_of(config, overrides)
    require_settings(settings)
    with _watcher(progress) as watcher:
        folder = simulation.run(settings, None if out is None else Path(out), watcher)
    return _ended(folder)


def resume(path: str | Path, *, progress: bool = True) -> Run:
    """Continue a run that was interrupted; it ends with the numbers that it would have had.

    Raises:
        UserError: there is no run in the folder, or it cannot continue here.
    """
    run_at(Path(path))
    with _watcher(progress) as watcher:
        simulation.resume(Path(path), watcher)
    return _ended(Path(path))


def open_run(path: str | Path) -> Run:
    """The run in a folder, also one that still goes on. Raises UserError if there is none."""
    return Run(path)


def settings_of(config: Config, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """A validated configuration of anything that `run` takes.

    Raises:
        UserError: the file is missing or not TOML, a key is unknown, or a value is of the wrong type or range.
    """
    if isinstance(config, Mapping):
        tree, origin = _plain(config), "config"
    else:
        known = config if isinstance(config, RunConfig) else load_named(Path(config), None)
        tree = known.model_dump(exclude_unset=True)
        origin = "config" if isinstance(config, RunConfig) else f"config {config}"
    for key, value in (overrides or {}).items():
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise UserError(f"{origin}: {key}: {section} is a value, not a section")
        node[last] = _plain(value)
    return config_from_tree(tree, origin)


def _plain(value: Any) -> Any:
    """A copy in which paths are text and mappings are dictionaries."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, PurePath) else deepcopy(value)


def describe_line(line: Mapping[str, Any]) -> str:
    """The figures of a round in a few words; empty: it was not measured."""
    from hfedmoe.events import Evaluation

    return describe(Evaluation(line["round"], line["accuracy"], line["macro_f1"], line["loss"], 0))


def _watcher(progress: bool) -> AbstractContextManager[Watcher]:
    if not progress:
        return Silent()
    from hfedmoe.report.live import Live

    return Live()


def _ended(folder: Path) -> Run:
    """The run that has ended, with its report; if that cannot be written, the run is good nevertheless."""
    from hfedmoe.report.page.page import write_report

    try:
        write_report([folder])
    except UserError as error:
        warnings.warn(f"no report was written: {error}", stacklevel=3)
    return Run(folder)
