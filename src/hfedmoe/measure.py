"""Evaluate a run's checkpoint, or a model without fine-tuning as the baseline.

The rows are the held-out rows of a configuration, a data set known by name, or a file. In the last two, multiple choice
is scored as lm-evaluation-harness does.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from hfedmoe.client.batches import tokens_of
from hfedmoe.config import DataConfig, ModelConfig, RunConfig
from hfedmoe.data.encoding import Batch
from hfedmoe.data.fits import check_task
from hfedmoe.data.task import Task
from hfedmoe.data.tasks import labels_of_run, load_rows, load_watched_task
from hfedmoe.errors import UserError
from hfedmoe.events import Watcher
from hfedmoe.models.adapted import is_adapter, load_adapted
from hfedmoe.models.loaded import Loaded
from hfedmoe.models.loading import load
from hfedmoe.models.wrapping import wrap
from hfedmoe.moe.anatomy import UnsupportedModelError, find_moe_layers
from hfedmoe.moe.experts.state import ExpertState
from hfedmoe.moe.model import MoEModel
from hfedmoe.prepare import Prepared, encoder_of, prepare
from hfedmoe.runs.checkpoints import Checkpoint
from hfedmoe.runs.choice import checkpoint_of, fitting
from hfedmoe.runs.folder import RunFolder
from hfedmoe.runs.identity import check_base, check_identity, identity_of, read_identity
from hfedmoe.server.evaluation import Metrics, evaluate, room_of


def evaluate_run(path: Path, which: str, watcher: Watcher) -> Metrics:
    """Evaluate a checkpoint ("last", "best" or a round's number) of a run on all its held-out rows.

    Raises:
        UserError: not a run folder, or no such checkpoint.
    """
    with RunFolder.open(path) as folder:
        checkpoint = checkpoint_of(folder, which)
        prepared = prepare(folder.config, watcher)
        was = read_identity(path)
        if was is not None:
            check_identity(path, identity_of(prepared.config, prepared.task, prepared.watch, was.carrier))
        return measure_checkpoint(prepared, checkpoint, watcher)


def measure_checkpoint(prepared: Prepared, checkpoint: Checkpoint, watcher: Watcher) -> Metrics:
    """Evaluate a checkpoint on all held-out rows. Raises UserError if it does not fit the model."""
    with fitting(checkpoint):
        return prepared.measure(checkpoint.tensors, "all", watcher.evaluating)


def evaluate_model(name: str, config: RunConfig, watcher: Watcher) -> Metrics:
    """Evaluate the model `name` on the held-out rows of a config.

    The config's own model is loaded with all its settings (upcycled, at its revision). Another model gets the settings
    for device, precision and trust, but not these two.

    Raises:
        UserError: the model or the data cannot be loaded.
    """
    settings = _settings_of(name, config.model)
    watcher.phase("reading the data")
    # The rows that a run is tested on, so that the two figures can be compared.
    task, _ = load_watched_task(config.data, config.partition, config.seed, config.evaluation.watch_rows)
    return _evaluate(settings, task, config, watcher)


def evaluate_model_on(name: str, data: DataConfig, config: RunConfig, watcher: Watcher) -> Metrics:
    """Evaluate the model `name` on the rows of a data set known by name or of a file, in their own order.

    Raises:
        UserError: the model or the data cannot be loaded.
    """
    watcher.phase("reading the data")
    return measure_model(name, load_rows(data), config, watcher)


def measure_model(name: str, task: Task, config: RunConfig, watcher: Watcher) -> Metrics:
    """Measure the model `name` on the held-out rows of a task, with the settings of a config.

    Raises:
        UserError: the model cannot be loaded, or the rows do not fit it.
    """
    return _evaluate(_settings_of(name, config.model), task, _comparable(config, task), watcher)


def evaluate_run_on(path: Path, which: str, data: DataConfig, watcher: Watcher) -> Metrics:
    """Evaluate a checkpoint ("last", "best" or a round's number) of a run on a data set known by name or on a file.

    Raises:
        UserError: not a run folder, no such checkpoint, or the data cannot be loaded.
    """
    with RunFolder.open(path) as folder:
        config = folder.config
    watcher.phase("reading the data")
    # The run was trained to answer with the labels of its own rows; these rows may not have all of them.
    task = load_rows(data, lambda: labels_of_run(config.data, config.partition, config.seed))
    return measure_run(path, which, task, config.model_copy(update={"data": data}), watcher)


def measure_run(path: Path, which: str, task: Task, config: RunConfig, watcher: Watcher) -> Metrics:
    """Measure a checkpoint of a run on the held-out rows of a task.

    Args:
        config: of the run, but `data` as the rows were read; device and precision may be others than the run's.

    Raises:
        UserError: not a run folder, no such checkpoint, its base model has changed, or the rows do not fit it.
    """
    with RunFolder.open(path) as folder:
        checkpoint = checkpoint_of(folder, which)
        check_base(path, config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    watcher.phase(f"loading {config.model.name}")
    loaded = load(config.model, config.seed)
    model = wrap(loaded.model, config, loaded.store)
    encoder = encoder_of(loaded, task, config.data)
    check_task(task, [], encoder, room_of(model.model, encoder.tokenizer))
    prepared = Prepared(_comparable(config, task), model, encoder, task, watch=[])
    return measure_checkpoint(prepared, checkpoint, watcher)


def _comparable(config: RunConfig, task: Task) -> RunConfig:
    """The settings, but whole choices are compared, as lm-evaluation-harness does."""
    if task.kind != "choices":
        return config
    evaluation = config.evaluation.model_copy(update={"scoring": "loglikelihood"})
    return config.model_copy(update={"evaluation": evaluation})


def _settings_of(name: str, own: ModelConfig) -> ModelConfig:
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file() and not is_adapter(path):
        raise UserError(f"{name}: neither a run folder (no config.toml) nor a model (no config.json)")
    return own if own.name == name else own.model_copy(update={"name": name, "upcycle": None, "revision": None})


def _evaluate(settings: ModelConfig, task: Task, config: RunConfig, watcher: Watcher) -> Metrics:
    watcher.phase(f"loading {settings.name}")
    adapter = is_adapter(Path(settings.name).expanduser())
    loaded = load_adapted(settings, config.seed) if adapter else load(settings, config.seed)
    encoder = encoder_of(loaded, task, config.data)
    check_task(task, [], encoder, room_of(loaded.model, encoder.tokenizer))
    return evaluate(
        loaded.model,
        task.test,
        encoder,
        config.evaluation.batch_size,
        config.evaluation.scoring,
        on_batch=watcher.evaluating,
        before_pass=_skip_padding(loaded),
        among_choices=config.train.loss == "choices",
    )


def _skip_padding(loaded: Loaded) -> Callable[[Batch], None] | None:
    """Let padding run no experts, for `evaluate`; it changes the model in place.

    The figures stay the same, because padding reaches no answer. None: the model is dense or quantised, or its experts
    run only in transformers.
    """
    if getattr(loaded.model.config, "quantization_config", None) is not None:
        return None  # its experts may compute with scales of their own
    try:
        for layer in find_moe_layers(loaded.model):
            ExpertState(layer, loaded.store).math()  # raises before anything is changed
        model = MoEModel(loaded.model, experts="frozen", router=False, store=loaded.store)
    except UnsupportedModelError:
        return None
    model.set_resident(None)
    return lambda batch: model.count(tokens_of(batch))
