"""Write a first config from rows and a model: what `hfedmoe init` does."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfedmoe.data.fits import check_task
from hfedmoe.errors import UserError
from hfedmoe.files.disk import disk_errors, replacing
from hfedmoe.models.loaded import Loaded, device_of
from hfedmoe.models.loading import structure, tokenizer_of
from hfedmoe.moe.anatomy import DenseModelError, UnsupportedModelError
from hfedmoe.prepare import encoder_of
from hfedmoe.report.inspection import Anatomy, described
from hfedmoe.server.evaluation import room_of
from hfedmoe.starting.data_section import put_data, rows_told
from hfedmoe.starting.draft import Draft
from hfedmoe.starting.federation import SIXTEEN_BIT, put_budget, put_clients, shape_of
from hfedmoe.starting.prompts import put_prompts
from hfedmoe.starting.rows import Seen
from hfedmoe.starting.tasks import Tasks


@dataclass(frozen=True)
class Asked:
    """What `hfedmoe init` was asked."""

    files: list[str]
    model: str
    out: Path
    given: dict[str, Any]
    """Settings of the user, as a tree."""


def write_first(asked: Asked, seen: Seen) -> str:
    """Write the config; returns some lines about what was seen, and the next command.

    Every check of a run's start is made here with the new config, without the model's weights.

    Raises:
        UserError: the model is dense, unknown or unsupported, the rows do not fit it, or the file cannot be written.
    """
    draft, tasks = Draft(asked.given), Tasks()
    anatomy = _put_model(asked, draft)
    told = rows_told(asked.files, seen)
    put_data(asked.files, seen, draft)
    model = draft.config().model
    loaded = Loaded(structure(model), tokenizer_of(model))
    told += put_prompts(draft, tasks, loaded)
    told += put_clients(asked.files, seen, draft, tasks)
    told += put_budget(draft, anatomy)
    config = draft.config()
    task, watch = tasks.of(config)
    notes = check_task(task, watch, encoder_of(loaded, task, config.data), room_of(loaded.model, loaded.tokenizer))
    command = f"hfedmoe run {shlex.quote(str(asked.out))}"
    with disk_errors(asked.out, "choose another --out"), replacing(asked.out) as file:
        file.write(draft.text(_head(asked, seen, command)).encode())
    return "\n".join([*told, *(f"note:   {text}" for text in notes), f"wrote {asked.out}; next: {command}"])


def _put_model(asked: Asked, draft: Draft) -> Anatomy:
    """Look at the model. Raises UserError if it is dense or not supported."""
    draft.put("name", _run_name(asked.files), "the run goes to runs/<date>-<name>")
    draft.put("model.name", asked.model)
    config = draft.config().model
    try:
        anatomy = described(config)
    except UnsupportedModelError as error:
        hint = ""
        if isinstance(error, DenseModelError) and error.can_be_upcycled:
            hint = " (here --set model.upcycle.experts=8, or --model)"
        raise UserError(f"{asked.model}: {error}{hint}") from None
    draft.put("model.name", asked.model, shape_of(anatomy))
    if anatomy.dtype in SIXTEEN_BIT and device_of(config.device).type != "cpu":
        draft.put("model.dtype", anatomy.dtype, "of the frozen weights, as they are stored")
    if anatomy.router_problem is not None:
        draft.put("train.router", False, "the routers of this model get no gradient")
    return anatomy


def _run_name(files: list[str]) -> str:
    first = Path(files[0])
    name = first.name.split(".")[0] if len(files) == 1 else first.absolute().parent.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "first"


def _head(asked: Asked, seen: Seen, command: str) -> list[str]:
    what = asked.files[0] if len(asked.files) == 1 else f"{len(asked.files)} files"
    return [
        f"Written by `hfedmoe init` for {what} ({len(seen.rows):,} rows) and the model {asked.model}.",
        f"Run it: {command}",
        f"All other settings have defaults: `{command} --show-config` prints them,",
        "docs/configuration.md explains them. To try another value for one run: --set train.lr=1e-3",
    ]
