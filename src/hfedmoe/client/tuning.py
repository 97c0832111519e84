"""After the last round: a client goes on training the experts that it holds, for itself.

Decision: it trains what a round trains (the experts, and with them its routers and shared tensors where those are
trained), from the final model, with the learning rate of the last round. All of that is kept as one: experts that were
trained with other routers than they are used with would be another model.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from hfedmoe.client.device import Device
from hfedmoe.client.history import ClientHistory
from hfedmoe.client.kept import Memory
from hfedmoe.events import OwnResult
from hfedmoe.files.disk import disk_errors, replacing
from hfedmoe.moe.payload import extract


@dataclass(frozen=True)
class Tuned:
    """What a client trained for itself."""

    client: int
    round: int
    """Of the shared model with which it began."""
    steps: int
    """That it did."""
    memory: Memory

    def to_bytes(self) -> bytes:
        """As a safetensors file: equal bytes for equal contents, which its metadata would not give."""
        return save(self.memory.to_tensors("") | {ABOUT: torch.tensor([self.client, self.round, self.steps])})

    @classmethod
    def read(cls, path: Path, num_experts: list[int]) -> "Tuned":
        """The inverse of `to_bytes`, from a file.

        Args:
            num_experts: per layer.

        Raises:
            ValueError: the file is no such one, is damaged, or belongs to a model with other experts.
        """
        about = about_of(path)
        try:
            tensors = load_file(path)
            del tensors[ABOUT]
            return cls(*about, Memory.from_tensors(tensors, "", num_experts))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(str(error)) from None


ABOUT = "about"
"""Tensor with client, round and steps, int64 [3]."""


def about_of(path: Path) -> tuple[int, int, int]:
    """Client, round and steps of a file; its large tensors are not read. Raises ValueError as `Tuned.read`."""
    try:
        with safe_open(path, "pt") as file:
            client, round, steps = file.get_tensor(ABOUT).tolist()
        return int(client), int(round), int(steps)
    except (OSError, SafetensorError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def tune(
    device: Device, history: ClientHistory, resident: list[Tensor], tensors: dict[str, Tensor]
) -> tuple[OwnResult, Tuned]:
    """Train `evaluation.tune_steps` steps from the final model; what that gains on its own rows, and the result.

    The history stays as it is, so that the same request gets the same answer.

    Args:
        resident: the experts that it holds, bool [E] per layer.
        tensors: the shared tensors of the final model, with the rows of these experts.

    Raises:
        TrainingError: the loss is not finite.
        MismatchError: the tensors do not fit the model.
    """
    config, numbers = device.config, device.model.num_experts
    train = config.train.model_copy(update={"steps": config.evaluation.tune_steps})
    own = replace(device, config=config.model_copy(update={"train": train}), on_step=None)
    scratch = ClientHistory.from_tensors(history.to_tensors(), numbers)
    own.hold(scratch, resident, tensors, own.with_own)
    before = own.judged()
    done = own.learn(scratch, resident, config.federation.rounds).work
    kept = Memory.nothing(numbers).updated(extract(own.model, resident), resident)
    told = own.told(before, own.judged())
    return told, Tuned(device.number, config.federation.rounds, done.steps, kept)


def keep(device: Device, tuned: Tuned) -> bytes | None:
    """Write what a real device trained into its file; of a simulated client, return it. Raises UserError."""
    blob = tuned.to_bytes()
    if device.tuned is None:
        return blob
    with disk_errors(device.tuned, "take part in the next run"):
        device.tuned.parent.mkdir(parents=True, exist_ok=True)
        with replacing(device.tuned) as file:
            file.write(blob)
    return None
