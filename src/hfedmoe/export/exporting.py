"""`hfedmoe export`: write a run's checkpoint to a folder that stock libraries load."""

import json
import logging
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hfedmoe.config import ModelConfig, RunConfig
from hfedmoe.data.kinds import settled_kind
from hfedmoe.data.known import known_set
from hfedmoe.data.tasks import labels_of_run
from hfedmoe.errors import UserError
from hfedmoe.export.adapter import check_adaptable, save_adapter
from hfedmoe.export.card import BASE, Export, card
from hfedmoe.export.classifying import classifier_of
from hfedmoe.export.in_memory import for_merging
from hfedmoe.export.merged import merge, save
from hfedmoe.export.mixtral import write_mixtral
from hfedmoe.export.options import check_fits, check_options, check_outside
from hfedmoe.export.personal import experts_per_layer, last_scores, most_valuable, router_groups, shrink
from hfedmoe.export.task_file import task_json
from hfedmoe.export.tuned import about as about_tuned
from hfedmoe.export.tuned import tuned_file, with_tuned
from hfedmoe.export.written import check_written
from hfedmoe.files.whole import check_free, writing, written_whole
from hfedmoe.models.carved import quantisation_of
from hfedmoe.models.loaded import Loaded
from hfedmoe.models.loading import load
from hfedmoe.models.names import PACKAGED_MODELS, source_of
from hfedmoe.models.wrapping import wrap
from hfedmoe.moe.anatomy import text_config
from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.prediction import withdraw
from hfedmoe.runs.checkpoints import Checkpoint
from hfedmoe.runs.choice import checkpoint_of, load_checkpoint
from hfedmoe.runs.existing import EXPORT
from hfedmoe.runs.folder import RunFolder
from hfedmoe.runs.identity import check_base


def export_run(
    path: Path,
    out: Path,
    form: str = "merged",
    client: int | None = None,
    checkpoint: str | None = None,
    dtype: str | None = None,
    tuned: Path | None = None,
) -> str:
    """Write a checkpoint of a run to `out`, whole or not at all; returns one line that says what was written.

    Args:
        form: "merged", "adapter" or "client".
        client: number of the client, for the form "client".
        checkpoint: "best", "last" or the number of a round; None: what the client trained for itself after the last
            round, if it did so and the form is "client", else "best".
        dtype: of the files; None: that of the model, or float32 for an adapter.
        tuned: for the form "client", a file of what it trained for itself; None: that in the run folder, if any.

    Raises:
        UserError: bad options, no such run or checkpoint, or the run cannot be exported in this form.
    """
    # PEFT imports bitsandbytes, which reports a missing package that is not needed here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    check_options(form, client, dtype, tuned, checkpoint)
    check_outside(out, path)
    check_free(out)
    with RunFolder.open(path) as run:
        config = run.config
        check_fits(path, config, form, client)
        own = tuned_file(run, client, tuned, checkpoint)
        _, round, steps = (0, "best", 0) if own is None else about_tuned(own)
        chosen = checkpoint_of(run, checkpoint or str(round))
        stored = {"dtype": "float32"} if _needs_float32(config.model, form, dtype) else {}
        config = for_merging(config, "cpu")
        config = config.model_copy(update={"model": config.model.model_copy(update=stored)})
        _check_not_quantised(config.model, form)
        check_base(path, config)
        with written_whole(out) as scratch:
            loaded = load(config.model, config.seed)
            about = Export(
                form=form,
                dtype=dtype or ("float32" if form == "adapter" else config.model.dtype),
                model_type=loaded.model.config.model_type,
                whole_type=_whole_type(config.model),
                encoder_decoder=loaded.encoder_decoder,
                client=client,
                tuned_steps=steps,
                choices=settled_kind(config.data) == "choices",
            )
            labels = _labels(path, config)
            if labels:
                about = replace(about, classifier=classifier_of(config, labels, loaded))
            write = {"merged": _merged, "adapter": _adapter, "client": _client}[form]
            about = write(_Job(run, config, loaded, chosen, out, own), scratch, about)
            text = card(run, chosen, about)
            with writing(out):
                loaded.tokenizer.save_pretrained(scratch)
                (scratch / "README.md").write_text(text, encoding="utf-8")
                # An adapter's base is read in float32: PEFT would round the adapter to the base's precision.
                stated = task_json(_saying(config, labels), "float32" if form == "adapter" else about.dtype)
                (scratch / EXPORT).write_text(stated, encoding="utf-8")
    return _told(out, chosen, about)


@dataclass(frozen=True)
class _Job:
    """The inputs of an export; `config` is that of the run, with other settings for loading the model."""

    run: RunFolder
    config: RunConfig
    loaded: Loaded
    checkpoint: Checkpoint
    out: Path
    tuned: Path | None
    """File of what the client trained for itself."""


def _labels(path: Path, config: RunConfig) -> tuple[str, ...]:
    """The labels of a run; empty if its task has none. Raises UserError if they are not known any more."""
    if settled_kind(config.data) != "classification":
        return ()
    try:
        return labels_of_run(config.data, config.partition, config.seed)
    except UserError as error:
        raise UserError(
            f"{path}: its config.toml does not say its labels, and its rows cannot be read to find them ({error}); "
            "write data.labels into it"
        ) from None


def _saying(config: RunConfig, labels: tuple[str, ...]) -> RunConfig:
    """The configuration with the format of the rows and the run's labels, where it does not say them."""
    known, found = known_set(config.data), dict[str, object]()
    if known is not None:
        found["format"] = known.name
    elif labels and config.data.labels is None:
        found["labels"] = list(labels)
    return config.model_copy(update={"data": config.data.model_copy(update=found)})


def _check_not_quantised(model: ModelConfig, form: str) -> None:
    """Raise UserError if the base checkpoint is quantised: LoRA terms cannot be merged into such weights."""
    method = quantisation_of(model)
    if method is not None and form != "adapter":
        raise UserError(
            f"model.name = {model.name}: is quantised ({method}), so trained changes cannot be merged into its "
            "weights; use --as adapter, or run on the original checkpoint"
        )


def _whole_type(model: ModelConfig) -> str | None:
    """The model type of a multimodal base, of which only the text model is loaded; None: not multimodal."""
    from transformers import AutoConfig

    if model.name in PACKAGED_MODELS:
        return None
    source, options = source_of(model)
    if "gguf_file" in options:
        return None
    described = AutoConfig.from_pretrained(source, **options)
    text = text_config(described)
    return described.model_type if text.model_type != described.model_type else None


def _needs_float32(model: ModelConfig, form: str, dtype: str | None) -> bool:
    """Whether to load the base in float32, not in the run's dtype, so that a float32 export is not rounded.

    Not for a base that was made for the run: it stays as the run used it.
    """
    return form != "adapter" and dtype == "float32" and not _made_here(model)


def _made_here(model: ModelConfig) -> bool:
    """Whether the base exists neither on the hub nor as a transformers folder."""
    return model.upcycle is not None or model.name in PACKAGED_MODELS or "gguf_file" in source_of(model)[1]


def _trained(job: _Job) -> MoEModel:
    """The model with the trained tensors of the checkpoint, and what a client trained for itself in their place."""
    model = wrap(job.loaded.model, job.config, job.loaded.store)
    checkpoint = job.checkpoint
    if job.tuned is not None:
        checkpoint = with_tuned(checkpoint, job.tuned, model.num_experts)
    load_checkpoint(checkpoint, model)
    return model


def _merged(job: _Job, scratch: Path, about: Export) -> Export:
    model = _trained(job)
    merge(model, getattr(torch, about.dtype))
    promised = withdraw(model.model.config)
    with writing(job.out):
        save(model.model, scratch)
    check_written(model.model, scratch)
    return replace(about, num_experts=model.num_experts, prediction_layers=promised)


def _adapter(job: _Job, scratch: Path, about: Export) -> Export:
    base, _ = source_of(job.config.model)
    own = _made_here(job.config.model)
    if own:
        with writing(job.out):
            _write_base(job.loaded.model, scratch / BASE, job.config)  # before anything is trained into it
            job.loaded.tokenizer.save_pretrained(scratch / BASE)
    elif Path(base).is_dir():
        base = str(Path(base).resolve())
    model = _trained(job)
    check_adaptable(model)
    recorded = str((job.out / BASE).resolve()) if own else base
    revision = None if own else job.config.model.revision
    with writing(job.out):
        save_adapter(model, scratch, recorded, revision, getattr(torch, about.dtype))
    return replace(about, num_experts=model.num_experts, base=BASE if own else base)


def _write_base(model: Any, folder: Path, config: RunConfig) -> None:
    folder.mkdir()
    if config.model.upcycle is not None:
        write_mixtral(model, folder)  # its experts share memory: one layer is copied at a time
    else:
        save(model, folder)


def _client(job: _Job, scratch: Path, about: Export) -> Export:
    assert about.client is not None
    scores = last_scores(job.run.read_expert_rows(), about.client)
    model = _trained(job)
    top_k = max(layer.top_k for layer in model.layers)
    number = experts_per_layer(scores.held, model.num_experts, top_k, model.config)
    keep = most_valuable(scores, number, model.num_experts, router_groups(model.config)[0])
    merge(model, getattr(torch, about.dtype))
    small = shrink(model, keep)
    kept = [mask.nonzero()[:, 0].tolist() for mask in keep]
    note = {
        "client": about.client,
        "round": job.checkpoint.round,
        "scores_of_round": scores.round,
        "experts_held": scores.held,
        **({"tuned_steps": about.tuned_steps} if job.tuned is not None else {}),
        "experts_per_layer": number,
        "layers": [
            {"layer": layer.index, "name": layer.name, "of": layer.num_experts, "experts": experts}
            for layer, experts in zip(model.layers, kept, strict=True)
        ],
    }
    promised = withdraw(small.config)
    with writing(job.out):
        save(small, scratch)
        (scratch / "experts.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    check_written(small, scratch)
    return replace(
        about, num_experts=model.num_experts, kept=kept, scores_round=scores.round, prediction_layers=promised
    )


def _told(out: Path, checkpoint: Checkpoint, about: Export) -> str:
    auto = "AutoModelForSeq2SeqLM" if about.encoder_decoder else "AutoModelForCausalLM"
    place = shlex.quote(str(out))
    if about.form == "adapter":
        where = f"{place}/{BASE}, which was made for this run" if about.base == BASE else about.base
        return f"{place}: PEFT adapter of round {checkpoint.round}; load it with PeftModel on its base, {where}"
    if about.form == "client":
        what = f"sub-model of client {about.client} with {len(about.kept[0])} experts per layer"
        if about.tuned_steps:
            what += f", which it trained {about.tuned_steps} steps further for itself,"
    else:
        what = "merged model"
    return f"{place}: {what} of round {checkpoint.round} in {about.dtype}; {auto}.from_pretrained loads it"
