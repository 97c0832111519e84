"""All messages between server and clients.

describe (query)  down: the version of hfedmoe; the terms of the task: its kind, labels and how answers are compared
                        (`data/terms.py`); digests of the base model and the tokenizer (`same.py`)
                  up:   the version; client number, name, examples, budget in experts, experts per layer of its model;
                        both digests
plan (query)      down: round; with method.bootstrap = "prior" the federation's usage so far, float32 [sum E_l]
                  up:   resident bits [sum E_l]; or, for a method that plans on the server, the client's scores
                        float32 [sum E_l]
train             down: round, resident bits; gates, shared tensors, rows of the resident experts; whether to plan the
                        next round at once
                  up:   trained bits [sum E_l]; gates, shared tensors, rows of the trained experts (or of all held
                        ones, depending on the method); usage, importance, tokens float32 [sum E_l]; `events.Work`;
                        if asked for, what a plan request for the next round would bring, which then is not sent
personal (query)  down: as train, with the model after the round
                  up:   `events.OwnScore`: a count and a mean on rows that the client kept back
measure (query)   down: as train, after the last round
                  up:   `events.OwnResult`: counts and means on rows that the client kept back
tune              down: as measure
                  up:   as measure: its sub-model before and after it went on training for itself; what it trained
                        stays with it
plan, train, personal, measure and tune
                  up:   if the client cannot do it, a status and the reason instead (`trouble.py`)

All tensors of a message are sent as one safetensors blob (`TENSORS`): no pickle, and Flower moves one object instead of
hundreds. Everything else is scalars and bytes in one record (`FACTS`).
Nothing that a client sends is trusted: see `checks.py`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from hfedmoe import __version__
from hfedmoe.events import OwnResult, OwnScore, Work
from hfedmoe.files.blob import Rows, dumps, loads
from hfedmoe.wire.same import NO_DIGESTS, Digests
from hfedmoe.wire.trouble import FAULT, Trouble

DESCRIBE, PLAN, TRAIN, MEASURE, TUNE = "query.describe", "query.plan", "train", "query.measure", "train.tune"
PERSONAL = "query.personal"
TENSORS, FACTS, BLOB = "tensors", "facts", "safetensors"


MOST_FACTS, MAX_FACTS = 64, 1 << 24
"""Most facts of a message, and most bytes of them: enough for the labels of a task and one bit per expert."""
MAX_VERSION = 40
"""Letters of a version that are shown."""
MAX_VALUE = 1e6
"""The largest value in a trained tensor: no real one comes near it, and larger ones could overflow an average."""
HEADER_PER_TENSOR = 512
"""Most bytes of a header for each tensor: its name, shape and position."""


class InvalidReplyError(ValueError):
    """A message has invalid content; the text says what is wrong."""


@dataclass(frozen=True, slots=True)
class Description:
    """Who a client is."""

    client: int
    name: str
    examples: int
    budget: int
    """Experts over all layers."""
    num_experts: list[int]
    digests: Digests = NO_DIGESTS


@dataclass
class Update:
    """What a client sends back after training."""

    tensors: dict[str, Tensor]
    """Whole gates and shared tensors; `experts.*` have only the rows of the experts in `sent`, in ascending order."""
    sent: list[Tensor]
    """bool [E] per layer: the trained or the held experts, depending on the method. Both sides know it."""
    trained: list[Tensor]
    """bool [E] per layer."""
    usage: list[Tensor]
    importance: list[Tensor]
    tokens: list[Tensor]
    """float32 [E] per layer each."""
    work: Work
    next: "Plan | None" = None
    """For the next round."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a client says before a round."""

    resident: list[Tensor] | None = None
    """The experts that it will hold, bool [E] per layer."""
    contribution: list[Tensor] | None = None
    """For a method that plans on the server: the client's scores, float32 [E] per layer."""


VECTORS = ("usage", "importance", "tokens")
LOSSES = ("first_loss", "last_loss", "mean_loss")
"""Losses of a client's steps, in the order in which they are sent."""
USAGE, CONTRIBUTION, RESIDENT, PLAN_NEXT = "usage", "contribution", "resident", "plan_next"


def pack_bits(masks: list[Tensor]) -> bytes:
    """bool [E] per layer -> bits, layer after layer."""
    return np.packbits(torch.cat(masks).cpu().numpy()).tobytes()


def unpack_bits(data: object, num_experts: list[int]) -> list[Tensor]:
    """The inverse of `pack_bits`. Raises InvalidReplyError if the length does not fit."""
    total = sum(num_experts)
    if not isinstance(data, bytes) or len(data) != (total + 7) // 8:
        raise InvalidReplyError(f"expected {(total + 7) // 8} bytes of expert bits")
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=total).astype(bool)
    return list(torch.from_numpy(bits).split(num_experts))


def record(facts: dict[str, object], tensors: Mapping[str, Tensor | Rows] | None = None) -> RecordDict:
    """A message's content."""
    content = RecordDict({FACTS: ConfigRecord(facts)})  # type: ignore[arg-type]
    if tensors is not None:
        blob = dumps(tensors)
        content[TENSORS] = ArrayRecord({BLOB: Array("uint8", (len(blob),), BLOB, blob)})
    return content


def facts_of(message: Message) -> ConfigRecord:
    """The scalars of a message. Raises InvalidReplyError if it has none."""
    content = message.content
    records = len(content.config_records) + len(content.array_records) + len(content.metric_records)
    if records > 2 or any(len(arrays) > 1 for arrays in content.array_records.values()):
        raise InvalidReplyError("the message has more than one record of facts and one of tensors")
    facts = content.config_records.get(FACTS)
    if facts is None:
        raise InvalidReplyError("the message has no facts")
    size = _facts_bytes(facts)
    if len(facts) > MOST_FACTS or size > MAX_FACTS:
        raise InvalidReplyError(
            f"the message has {len(facts)} facts of {size} bytes; at most {MOST_FACTS} of {MAX_FACTS} bytes are allowed"
        )
    return facts


def tensors_of(message: Message, max_bytes: int | None = None, most_tensors: int = 1 << 17) -> dict[str, Tensor]:
    """The tensors of a message. They are views of it: do not write to them.

    Raises:
        InvalidReplyError: there are none, they are larger than `max_bytes` or more than `most_tensors`, or they are not
            safetensors.
    """
    records = message.content.array_records.get(TENSORS)
    array = None if records is None else records.get(BLOB)
    if array is None or array.stype != BLOB:
        raise InvalidReplyError("the message has no tensors")
    if max_bytes is not None and len(array.data) > max_bytes:
        raise InvalidReplyError(f"{len(array.data)} bytes of tensors where at most {max_bytes} are expected")
    try:
        return loads(array.data, 4096 + HEADER_PER_TENSOR * most_tensors)
    except Exception as error:  # a crafted header can make the reader raise any error
        raise InvalidReplyError(f"the tensors cannot be read ({error})") from None


def wire_bytes(content: RecordDict) -> int:
    """Bytes of a message's content: blobs, and names and values of the facts."""
    total = sum(len(array.data) for arrays in content.array_records.values() for array in arrays.values())
    for facts in content.config_records.values():
        total += _facts_bytes(facts)
    return total


def _facts_bytes(facts: ConfigRecord) -> int:
    return sum(len(key) + _value_bytes(value) for key, value in facts.items())


def _value_bytes(value: object) -> int:
    if isinstance(value, bytes | str):
        return len(value)
    if isinstance(value, list):
        return sum(_value_bytes(item) for item in value)
    return 8


def describe_request(terms: str, digests: Digests = NO_DIGESTS) -> RecordDict:
    """Ask a client who it is.

    Args:
        terms: the run's task, as text (`data.terms.Terms.to_json`).
        digests: of the server's model; the client compares those that are not empty with its own.
    """
    return record({"version": __version__, "terms": terms, **asdict(digests)})


def terms_of_request(message: Message) -> str:
    """The run's task in a describe request, as text. Raises InvalidReplyError if there is none."""
    terms = facts_of(message).get("terms")
    if not isinstance(terms, str):
        raise InvalidReplyError("the request does not contain the run's task")
    return terms


def other_version(facts: ConfigRecord) -> str | None:
    """The version of the other side of a describe message, safe to print; None: it is this one."""
    theirs = facts.get("version")
    if theirs == __version__:
        return None
    text = theirs[:MAX_VERSION] if isinstance(theirs, str) else ""
    return "".join(letter for letter in text if letter.isprintable()) or "an earlier one"


def describe_reply(description: Description) -> RecordDict:
    """Who a client is; the server reads it with `checks.description`."""
    return record(
        {
            "client": description.client,
            "name": description.name,
            "examples": description.examples,
            "budget": description.budget,
            "num_experts": description.num_experts,
            "version": __version__,
            **asdict(description.digests),
        }
    )


def plan_request(round: int, usage: Tensor | None = None) -> RecordDict:
    """Ask a client for its experts. `usage`: the federation's so far, float32 [sum E_l], for a bootstrap of "prior"."""
    return record({"round": round}, None if usage is None else {USAGE: usage})


def usage_of(message: Message, num_experts: list[int]) -> list[Tensor] | None:
    """The federation's usage in a plan request, float32 [E] per layer; None if it has none.

    Raises:
        InvalidReplyError: it is not one finite number per expert.
    """
    if TENSORS not in message.content.array_records:
        return None
    total = sum(num_experts)
    usage = tensors_of(message, max_bytes=4 * total + 4096, most_tensors=1).get(USAGE)
    if usage is None or usage.shape != (total,) or usage.dtype != torch.float32 or not bool(usage.isfinite().all()):
        raise InvalidReplyError(f"the federation's usage is not {total} finite numbers")
    return [part.clone() for part in usage.split(num_experts)]


def plan_reply(plan: Plan) -> RecordDict:
    """A client's plan; the server reads it with `checks.plan`."""
    return record(*_parts(plan))


def _parts(plan: Plan | None) -> tuple[dict[str, object], dict[str, Tensor] | None]:
    """The facts and the tensors of a plan; None: it has none of them."""
    if plan is None:
        return {}, None
    if plan.contribution is not None:
        return {}, {CONTRIBUTION: torch.cat(plan.contribution).float()}
    assert plan.resident is not None
    return {RESIDENT: pack_bits(plan.resident)}, None


def trouble_reply(trouble: Trouble, private: bool = False) -> RecordDict:
    """A client could not do its part; the server reads it with `checks.trouble`.

    Args:
        private: for real devices: send a code and a count instead of the reason.
    """
    if private:
        return record({"status": trouble.status, "code": trouble.code or FAULT, "count": trouble.count})
    return record({"status": trouble.status, "reason": trouble.reason})


def train_request(
    round: int, resident: list[Tensor], tensors: Mapping[str, Tensor | Rows], plan_next: bool = False
) -> RecordDict:
    """Ask a client to train the `resident` experts, bool [E] per layer; `tensors` has whole gates and their rows.

    Args:
        plan_next: it shall also say what it will hold in the next round.
    """
    facts: dict[str, object] = {"round": round, RESIDENT: pack_bits(resident)}
    return record(facts | ({PLAN_NEXT: True} if plan_next else {}), tensors)


def train_reply(update: Update) -> RecordDict:
    """What a client trained and measured; the server reads it with `checks.update`."""
    vectors = {name: torch.cat(getattr(update, name)).float() for name in VECTORS}
    # A record cannot hold None.
    work = {name: value for name, value in asdict(update.work).items() if value is not None}
    losses = [work.pop(name) for name in LOSSES if name in work]
    if len(losses) == len(LOSSES):
        work["step_losses"] = losses  # in one fact, to save bytes
    facts, tensors = _parts(update.next)
    return record({"trained": pack_bits(update.trained), **work, **facts}, update.tensors | vectors | (tensors or {}))


def measure_reply(result: OwnResult | OwnScore) -> RecordDict:
    """What a client measured on its own rows; the server reads it with `checks.own_result` or `checks.own_score`."""
    return record({name: value for name, value in asdict(result).items() if value is not None})
