"""Load a checkpoint of a run by name, and report in one line if it does not fit the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hfedmoe.errors import UserError
from hfedmoe.runs.checkpoints import Checkpoint, Which
from hfedmoe.runs.folder import RunFolder

if TYPE_CHECKING:
    from hfedmoe.moe.model import MoEModel


@contextmanager
def fitting(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn a ValueError in the block into a UserError: the checkpoint does not fit the model."""
    try:
        yield
    except ValueError as error:
        raise UserError(
            f"{checkpoint.path}: does not fit the model ({error}); undo any changes to the run's config.toml"
        ) from None


def load_checkpoint(checkpoint: Checkpoint, model: "MoEModel") -> None:
    """Put the trained tensors of a checkpoint into a model. Raises UserError if they do not fit it."""
    from hfedmoe.moe.payload import load_all

    with fitting(checkpoint):
        load_all(model, checkpoint.tensors)


def checkpoint_of(folder: RunFolder, which: str) -> Checkpoint:
    """The checkpoint that "last", "best" or the number of a round names. Raises UserError if there is none."""
    return folder.load_checkpoint(which_of(which))


def which_of(which: str) -> Which:
    """What "last", "best" or the number of a round asks for. Raises UserError for another text."""
    numbered = which.isascii() and which.isdecimal()  # int() does not accept every Unicode digit
    if which not in ("last", "best") and not numbered:
        raise UserError(f'checkpoint "{which}": expected last, best or the number of a round')
    return int(which) if numbered else which  # type: ignore[return-value]
