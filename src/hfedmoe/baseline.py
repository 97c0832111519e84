"""Measure a model as it is, without a run: the figure that fine-tuning has to beat."""

from pathlib import Path

from hfedmoe.config import RunConfig
from hfedmoe.data.encoding import Encoder
from hfedmoe.data.tasks import load_watched_task
from hfedmoe.errors import UserError
from hfedmoe.evaluation import Metrics, evaluate
from hfedmoe.loading import load
from hfedmoe.report.live import Watcher


def evaluate_model(name: str, config: RunConfig, watcher: Watcher) -> Metrics:
    """Evaluate the model `name` on the held-out rows of a config.

    The config's own model is taken with all its settings (upcycled, at its revision); another one keeps only device,
    precision and trust.

    Raises:
        UserError: the model or the data cannot be loaded.
    """
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{name}: neither a run folder (no config.toml) nor a model (no config.json)")
    settings = config.model
    if settings.name != name:
        settings = settings.model_copy(update={"name": name, "upcycle": None, "revision": None})
    watcher.phase("reading the data")
    # The rows that a run is tested on, so that the two figures can be compared.
    task, _ = load_watched_task(config.data, config.partition, config.seed, config.evaluation.watch_rows)
    watcher.phase(f"loading {name}")
    loaded = load(settings, config.seed)
    encoder = Encoder.for_task(
        loaded.tokenizer, task, config.data.max_tokens, loaded.encoder_decoder, loaded.decoder_start_token_id
    )
    return evaluate(
        loaded.model,
        task.test,
        encoder,
        config.evaluation.batch_size,
        config.evaluation.scoring,
        on_batch=watcher.evaluating,
    )
