"""What can be refused of an export at once, before torch and transformers are imported."""

import os
from pathlib import Path
from typing import get_args

from hfedmoe.config import ModelConfig, RunConfig
from hfedmoe.errors import UserError

FORMS = ("merged", "adapter", "client")
DTYPES = get_args(ModelConfig.model_fields["dtype"].annotation)


def check_options(
    form: str, client: int | None, dtype: str | None, tuned: Path | None = None, checkpoint: str | None = None
) -> None:
    """Raise UserError for a form, client, precision or file that there is not, or that do not go together."""
    if form not in FORMS:
        raise UserError(f"--as {form}: expected {', '.join(FORMS)}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: expected {', '.join(DTYPES)}")
    if form == "client" and client is None:
        raise UserError("--as client: no client is given; add --client with its number")
    if form != "client" and client is not None:
        raise UserError(f"--client {client}: allowed only with --as client")
    if tuned is None:
        return
    if form != "client":
        raise UserError(f"--tuned {tuned}: allowed only with --as client")
    if checkpoint is not None:
        raise UserError(f"--tuned {tuned}: says itself with which round it began; leave --checkpoint out")
    if not tuned.is_file():
        raise UserError(f"--tuned {tuned}: no such file")


def check_outside(out: Path, run: Path) -> None:
    """Raise UserError if `out` is the run's folder or inside it, where the run may delete it."""
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(run)):
        raise UserError(f"{out}: is in the run's own folder, where a resumed run may delete it; choose another folder")


def check_fits(run: Path, config: RunConfig, form: str, client: int | None) -> None:
    """Raise UserError for a form or client that the run cannot have."""
    if client is not None and not 0 <= client < config.clients.count:
        raise UserError(f"--client {client}: the run has clients 0 to {config.clients.count - 1}")
    if form == "adapter" and config.train.experts == "full":
        raise UserError(f'{run}: trained whole experts (train.experts = "full"), not an adapter; use --as merged')
