"""What a client trained for itself after the last round (`client.tuning`), for the export of its sub-model."""

from dataclasses import replace
from pathlib import Path

import torch

from hfedmoe.client.tuning import Tuned, about_of
from hfedmoe.errors import UserError
from hfedmoe.moe.payload import kind_of
from hfedmoe.runs.checkpoints import Checkpoint
from hfedmoe.runs.folder import RunFolder


def tuned_file(run: RunFolder, client: int | None, given: Path | None, checkpoint: str | None) -> Path | None:
    """The file of what a client trained for itself; None: it did not, or the shared model of a checkpoint is wanted.

    Args:
        given: a file that is not in the run folder: a device's own.
        checkpoint: as it was asked for; None: it was not.

    Raises:
        UserError: the given file is not one of this client.
    """
    if given is None:
        own = None if client is None or checkpoint is not None else run.tuned(client)
        return own if own is not None and own.is_file() else None
    of, _, _ = about(given)
    if of != client:
        raise UserError(f"--tuned {given}: is of client {of}; give --client {of}")
    return given


def about(path: Path) -> tuple[int, int, int]:
    """Of a file: client, round with which it began, and steps. Raises UserError if it is none, or damaged."""
    try:
        return about_of(path)
    except ValueError as error:
        raise UserError(f"{path}: not what a client trained for itself, or damaged ({error})") from None


def with_tuned(checkpoint: Checkpoint, path: Path, num_experts: list[int]) -> Checkpoint:
    """The checkpoint of the round with which the client began, with what it trained in its place.

    Args:
        num_experts: per layer.

    Raises:
        UserError: the file is damaged, or of another run.
    """
    try:
        memory = Tuned.read(path, num_experts).memory
        shared = checkpoint.tensors
        for name, own in memory.tensors.items():
            start = 1 if kind_of(name) == "experts" else 0
            if name not in shared or own.shape[start:] != shared[name].shape[start:]:
                raise ValueError(f"{name} does not fit")
        everything = [torch.ones(number, dtype=torch.bool) for number in num_experts]
        return replace(checkpoint, tensors=memory.over(shared, everything))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{path}: is damaged, or of another run ({error})") from None
