"""Check everything that the server asks before any of it is done: a device does not trust the server."""

import math
from typing import Any

import torch
from flwr.app import Message
from torch import Tensor

from hfedmoe import __version__
from hfedmoe.config import RunConfig
from hfedmoe.data.terms import Terms
from hfedmoe.wire.messages import (
    MAX_VALUE,
    PLAN_NEXT,
    RESIDENT,
    InvalidReplyError,
    facts_of,
    other_version,
    tensors_of,
    terms_of_request,
    unpack_bits,
)
from hfedmoe.wire.same import Digests

MOST = {
    "federation.rounds": 1_000_000,
    "train.steps": 100_000,
    "evaluation.tune_steps": 100_000,
    "train.batch_size": 65_536,
    "train.rank": 4_096,
    "data.max_tokens": 1 << 20,
    "method.bootstrap_batches": 100_000,
}
"""The largest settings that a device accepts. No run should need more, and each limits memory or time."""


class InvalidRequestError(ValueError):
    """The server asks for something that a device refuses; the text says what."""


class OtherVersionError(ValueError):
    """The server has another version of hfedmoe; the text says which."""


def check_settings(config: RunConfig) -> None:
    """Raise InvalidRequestError if a run's settings ask a device for more than `MOST`."""
    for key, most in MOST.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value > most:
            raise InvalidRequestError(f"{key} = {value} is more than {most}, which is the most a device accepts")


def check_version(message: Message) -> None:
    """Raise OtherVersionError if the server that describes its task has another version of hfedmoe."""
    theirs = other_version(_facts(message))
    if theirs is not None:
        raise OtherVersionError(
            f"the server has another version of hfedmoe: {theirs}; this device has {__version__}; install the same"
        )


def digests_of(message: Message) -> Digests:
    """The digests in a describe request; empty ones are not compared. Raises InvalidRequestError."""
    base, tokenizer = (_facts(message).get(name, "") for name in ("base", "tokenizer"))
    if not isinstance(base, str) or not isinstance(tokenizer, str):
        raise InvalidRequestError("a digest of the server's model is not a text")
    return Digests(base, tokenizer)


def task_of(message: Message) -> Terms:
    """The run's task in a describe request. Raises InvalidRequestError if there is none."""
    try:
        return Terms.from_json(terms_of_request(message))
    except ValueError as error:
        raise InvalidRequestError(str(error)) from None


def round_of(message: Message, rounds: int) -> int:
    """The number of the round, 1 to `rounds`. Raises InvalidRequestError."""
    value: Any = _facts(message).get("round")
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= rounds:
        raise InvalidRequestError(f"the round is not a number from 1 to {rounds}")
    return value


def plans_next(message: Message) -> bool:
    """Whether the server wants to know with the update what the client will hold in the next round."""
    return _facts(message).get(PLAN_NEXT) is True


def residents_of(message: Message, num_experts: list[int], at_least: list[int], allowed: int) -> list[Tensor]:
    """The experts to train, bool [E] per layer: `at_least` per layer, at most `allowed` over all layers.

    Raises:
        InvalidRequestError: they are too few, too many or malformed.
    """
    try:
        resident = unpack_bits(_facts(message).get(RESIDENT), num_experts)
    except InvalidReplyError as error:
        raise InvalidRequestError(str(error)) from None
    for layer, (keep, k) in enumerate(zip(resident, at_least, strict=True)):
        if int(keep.sum()) < k:
            raise InvalidRequestError(f"{int(keep.sum())} experts in layer {layer}, fewer than {k}")
    held = sum(int(keep.sum()) for keep in resident)
    if held > allowed:
        raise InvalidRequestError(f"{held} experts, more than the {allowed} that the device has room for")
    return resident


def trainables_of(message: Message) -> dict[str, Tensor]:
    """The tensors to start from, finite and not too large; `moe.payload.load` checks names and shapes.

    Raises:
        InvalidRequestError: there are none, or one is out of range.
    """
    try:
        tensors = tensors_of(message)
    except InvalidReplyError as error:
        raise InvalidRequestError(str(error)) from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InvalidRequestError(f"{name} is {tensor.dtype}")
        if tensor.numel():
            low, high = (float(extreme) for extreme in torch.aminmax(tensor))
            if not (math.isfinite(low) and math.isfinite(high)) or max(-low, high) > MAX_VALUE:
                raise InvalidRequestError(f"{name} is not finite, or has values over {MAX_VALUE:g}")
    return tensors


def _facts(message: Message) -> Any:
    try:
        return facts_of(message)
    except InvalidReplyError as error:
        raise InvalidRequestError(str(error)) from None
