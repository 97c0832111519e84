"""Check everything that clients send before any of it is used: nothing from a client is trusted."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ConfigRecord, Message
from torch import Tensor

from hfedmoe import __version__
from hfedmoe.config import RunConfig
from hfedmoe.events import OwnResult, OwnScore, Work
from hfedmoe.method.methods import METHODS
from hfedmoe.method.row import Kind
from hfedmoe.moe.payload import layer_of, lora_pairs, public
from hfedmoe.moe.ranks import cut
from hfedmoe.wire.messages import (
    CONTRIBUTION,
    LOSSES,
    MAX_VALUE,
    RESIDENT,
    VECTORS,
    Description,
    InvalidReplyError,
    Plan,
    Update,
    facts_of,
    other_version,
    tensors_of,
    unpack_bits,
)
from hfedmoe.wire.same import NO_DIGESTS, Digests
from hfedmoe.wire.trouble import BASE, CODES, STATUSES, TOKENIZER

MAX_EXAMPLES = 10**9
MAX_NAME = 80
MOST_TURNS = 1000
"""Rows of one conversation that is kept back as a whole."""
ROUNDING = 1e-3
"""Allowed error of sums of float32 shares over the experts of a layer."""
HEADER_ROOM = 1 << 20
"""Bytes that names and shapes may add to the tensors of an update."""


@dataclass(frozen=True)
class Asked:
    """What every client is asked to do in a round. It limits what a client can report."""

    steps: int
    pairs: list[int]
    """Per layer, the most (token, expert) pairs of one step."""
    sends: str = "trained"
    """The experts whose rows come back: "trained" or "held" (`method.methods.Method.sends`)."""
    exact: bool = False
    """Whether products of LoRA pairs are averaged (`Method.exact_lora`)."""
    private: frozenset[Kind] = frozenset()
    """Kinds of tensors that stay on the client."""

    @classmethod
    def of(cls, config: RunConfig, top_k: list[int]) -> "Asked":
        """What a configuration asks for; a row has a prompt and an answer of at most data.max_tokens each."""
        tokens, method = 2 * config.data.max_tokens * config.train.batch_size, METHODS[config.method.name]
        pairs = [tokens * k for k in top_k]
        exact = method.exact_lora(config.train.lora)
        return cls(config.train.steps, pairs, method.sends, exact, method.private)


class TroubleError(InvalidReplyError):
    """The client says that it could not do its part; `status` says in words why (`trouble.STATUSES`)."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def trouble(message: Message) -> None:
    """Raise TroubleError if the reply says that the client could not do its part, InvalidReplyError if it is wrong."""
    facts = facts_of(message)
    if "status" not in facts:
        return
    status, reason, code = facts["status"], facts.get("reason"), facts.get("code")
    if status not in STATUSES:
        raise InvalidReplyError("its status is unknown")
    if code is not None:
        if code not in CODES:
            raise InvalidReplyError("its code is unknown")
        reason = CODES[str(code)].format(count=_whole(facts, "count", 0, MAX_EXAMPLES))
    if not isinstance(reason, str):
        raise InvalidReplyError("it gives neither a reason nor a code")
    raise TroubleError(str(status).replace("_", " "), reason)


def description(message: Message, num_experts: list[int], digests: Digests = NO_DIGESTS) -> Description:
    """Who the client says it is.

    Args:
        num_experts, digests: of the server's model; every client must have the same.

    Raises:
        InvalidReplyError: something is missing or out of range, or the client has another model or tokenizer.
    """
    facts = facts_of(message)
    theirs = other_version(facts)
    if theirs is not None:
        raise InvalidReplyError(
            f"it has another version of hfedmoe: {theirs}; the server has {__version__}; install the same"
        )
    name = facts.get("name")
    if not isinstance(name, str) or len(name) > MAX_NAME or not name.isprintable():
        raise InvalidReplyError("its name is not a short text")
    experts = facts.get("num_experts")
    if experts != num_experts:
        raise InvalidReplyError(f"its model has another number of experts per layer ({str(experts)[:60]})")
    for fact, expected, code in (("base", digests.base, BASE), ("tokenizer", digests.tokenizer, TOKENIZER)):
        if facts.get(fact) != expected:
            raise InvalidReplyError(CODES[code])
    return Description(
        client=_whole(facts, "client", 0, MAX_EXAMPLES),
        name=name,
        examples=_whole(facts, "examples", 1, MAX_EXAMPLES),
        budget=_whole(facts, "budget", 1, sum(num_experts)),
        num_experts=num_experts,
        digests=digests,
    )


@dataclass(frozen=True)
class Room:
    """What a client's plan must keep to."""

    num_experts: list[int]
    at_least: list[int]
    """Experts per layer."""
    budget: int
    """Experts over all layers."""
    scores: bool = False
    """Whether the client sends scores, because the server plans."""


def plan(message: Message, room: Room) -> Plan:
    """What a client says before a round. Raises InvalidReplyError."""
    if room.scores:
        total = sum(room.num_experts)
        tensors = tensors_of(message, max_bytes=4 * total + 4096, most_tensors=1)
        return Plan(contribution=_scores(tensors.get(CONTRIBUTION), room.num_experts))
    return Plan(_residents(facts_of(message), room))


def _residents(facts: ConfigRecord, room: Room) -> list[Tensor]:
    """The experts that a client wants to hold: within its budget, `at_least` per layer."""
    resident = unpack_bits(facts.get(RESIDENT), room.num_experts)
    for layer, (keep, k) in enumerate(zip(resident, room.at_least, strict=True)):
        if int(keep.sum()) < k:
            raise InvalidReplyError(f"plans {int(keep.sum())} experts in layer {layer}, fewer than {k}")
    total = sum(int(keep.sum()) for keep in resident)
    if total > room.budget:
        raise InvalidReplyError(f"plans {total} experts, more than its budget of {room.budget}")
    return resident


def _scores(scores: Tensor | None, num_experts: list[int]) -> list[Tensor]:
    """The scores of a client for a method that plans on the server, float32 [E] per layer."""
    total = sum(num_experts)
    if scores is None or scores.shape != (total,) or scores.dtype != torch.float32 or not bool(scores.isfinite().all()):
        raise InvalidReplyError(f"its scores are not {total} finite numbers")
    return [part.clone() for part in scores.split(num_experts)]


def update(
    message: Message,
    resident: list[Tensor],
    like: dict[str, Tensor],
    asked: Asked,
    rank: int | None = None,
    room: Room | None = None,
) -> Update:
    """A client's update, if every tensor is finite and has the expected name, shape and dtype.

    Args:
        resident: what the client was given, bool [E] per layer.
        like: the global tensors, experts as [E, ...].
        asked: what it was asked to do.
        rank: of the LoRA pairs of this client's experts; None: that of `like`.
        room: for its plan of the next round, if it was asked for one; a client may leave it out.

    Raises:
        InvalidReplyError: anything is missing, unexpected, misshapen, out of range or not finite.
    """
    facts = facts_of(message)
    num_experts = [len(keep) for keep in resident]
    trained = unpack_bits(facts.get("trained"), num_experts)
    for layer, (did, had) in enumerate(zip(trained, resident, strict=True)):
        if bool((did & ~had).any()):
            raise InvalidReplyError(f"says it trained experts of layer {layer} that it was not given")
    sent = trained if asked.sends == "trained" else resident
    expected = {
        name: (torch.Size([int(sent[layer_of(name)].sum()), *tensor.shape[1:]]), tensor.dtype)
        if name.startswith("experts.")
        else (tensor.shape, tensor.dtype)
        for name, tensor in cut(public(like, asked.private), rank).items()
    }
    vectors_of = VECTORS + ((CONTRIBUTION,) if room is not None and room.scores else ())
    expected |= {name: (torch.Size([sum(num_experts)]), torch.float32) for name in vectors_of}
    size = sum(shape.numel() * dtype.itemsize for shape, dtype in expected.values())
    tensors = tensors_of(message, max_bytes=size + HEADER_ROOM, most_tensors=len(expected))
    if CONTRIBUTION not in tensors:
        expected.pop(CONTRIBUTION, None)
    if set(tensors) != set(expected):
        raise InvalidReplyError(f"tensors missing or unexpected: {', '.join(sorted(set(tensors) ^ set(expected))[:3])}")
    for name, (shape, dtype) in expected.items():
        if tensors[name].shape != shape:
            raise InvalidReplyError(f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(shape)}")
        if tensors[name].dtype != dtype:
            raise InvalidReplyError(f"{name} is {tensors[name].dtype}, expected {dtype}")
        if tensors[name].numel():
            low, high = (float(extreme) for extreme in torch.aminmax(tensors[name]))  # one pass, no temporary
            if not (math.isfinite(low) and math.isfinite(high)):
                raise InvalidReplyError(f"{name} is not finite")
            if name not in vectors_of and max(-low, high) > MAX_VALUE:
                raise InvalidReplyError(f"{name} has values over {MAX_VALUE:g}")
    if asked.exact:
        _check_products(tensors, like, sent)
    planned = _next(facts, tensors.pop(CONTRIBUTION, None), room)
    vectors = {name: list(tensors.pop(name).split(num_experts)) for name in VECTORS}
    work = _work(facts, asked, max(num_experts))
    _check_vectors(vectors, [work.steps * pairs for pairs in asked.pairs])
    return Update(tensors=tensors, sent=sent, trained=trained, work=work, next=planned, **vectors)


def next_plan(message: Message, room: Room) -> Plan | None:
    """The experts that a client will hold next, from its update; None: it does not say. Raises InvalidReplyError."""
    return _next(facts_of(message), None, room)


def _next(facts: ConfigRecord, scores: Tensor | None, room: Room | None) -> Plan | None:
    """The plan for the next round in an update; None: it has none."""
    if room is None:
        return None
    if room.scores:
        return None if scores is None else Plan(contribution=_scores(scores, room.num_experts))
    if RESIDENT not in facts:
        return None
    return Plan(_residents(facts, room))


def own_result(message: Message, most_rows: int, choices: bool) -> OwnResult:
    """What a client measured on rows of its own, if the figures are possible.

    Args:
        most_rows: that it may keep back (`evaluation.own_rows`; a conversation counts as one, so rows may be more).
        choices: whether the task has choices.

    Raises:
        InvalidReplyError: a figure is missing or out of range.
    """
    facts = facts_of(message)
    rows = _whole(facts, "own_rows", 0, most_rows * MOST_TURNS)
    trained = _whole(facts, "trained_rows", 1, MAX_EXAMPLES)
    if not rows:
        return OwnResult(trained_rows=trained, own_rows=0)
    counts: dict[str, int] = {}
    if choices:
        before = _whole(facts, "right_before", 0, rows)
        counts = {
            "right_before": before,
            "won": _whole(facts, "won", 0, rows - before),
            "lost": _whole(facts, "lost", 0, before),
        }
    return OwnResult(
        trained_rows=trained,
        own_rows=rows,
        **counts,
        f1_before=_share(facts, "f1_before") if choices else None,
        f1_after=_share(facts, "f1_after") if choices else None,
        loss_before=_loss(facts, "loss_before"),
        loss_after=_loss(facts, "loss_after"),
    )


def own_score(message: Message, most_rows: int, choices: bool) -> OwnScore:
    """What a client measured on rows of its own while the run goes on, if that is possible; as `own_result`."""
    facts = facts_of(message)
    rows = _whole(facts, "own_rows", 0, most_rows * MOST_TURNS)
    if not rows:
        return OwnScore(own_rows=0)
    right = _whole(facts, "right", 0, rows) if choices else None
    return OwnScore(own_rows=rows, right=right, loss=_loss(facts, "loss"))


def _check_products(tensors: dict[str, Tensor], like: dict[str, Tensor], sent: list[Tensor]) -> None:
    """Check that no factor of the mean of LoRA products can exceed MAX_VALUE (`method.products`).

    Each new B is computed from the mean product divided by `scale`, which is the norm of the earlier A divided by the
    square root of the rank. The norm of a mean is at most the largest norm of its parts, and the norm of a product is
    at most the product of the norms of its factors.
    """
    for a_name, b_name in lora_pairs(tensors):
        a, b, before = tensors[a_name], tensors[b_name], like[a_name]
        if a_name.startswith("experts."):
            before = before[sent[layer_of(a_name)].to(before.device)]
        else:
            a, b, before = a[None], b[None], before[None]
        norms = before.float().flatten(1).norm(dim=1)
        scale = torch.where(norms > 0, norms / before.shape[1] ** 0.5, 1.0)
        size = a.float().flatten(1).norm(dim=1) * b.float().flatten(1).norm(dim=1)
        if bool((size > MAX_VALUE * scale.to(size.device)).any()):
            raise InvalidReplyError(f"the product of {a_name} and its B has values over {MAX_VALUE:g}")


def _work(facts: ConfigRecord, asked: Asked, most_experts: int) -> Work:
    """What a client says that it did, checked to be possible; `most_experts`: the largest number in a layer."""
    steps_wanted = _whole(facts, "steps_wanted", asked.steps, asked.steps)
    work = Work(
        examples=_whole(facts, "examples", 1, MAX_EXAMPLES),
        steps=_whole(facts, "steps", 1, steps_wanted),
        steps_wanted=steps_wanted,
        **_losses(facts),
        seconds=_seconds(facts),
        peak_bytes=_whole(facts, "peak_bytes", 0, 1 << 60),
        peak_is_measured=facts.get("peak_is_measured") is True,
        activation=_positive(facts, "activation", most_experts),
        deadline_s=_positive(facts, "deadline_s", 1e9),
    )
    if work.deadline_s is not None and work.activation is None:
        raise InvalidReplyError("has a deadline, but does not say how many experts its steps trained")
    return work


def _check_vectors(vectors: dict[str, list[Tensor]], pairs: list[int]) -> None:
    """Check the vectors that decide a client's weight: shares of 1, and no more tokens than possible.

    Args:
        pairs: per layer, the most (token, expert) pairs of the round.
    """
    for name, limit in (("usage", 1 + ROUNDING), ("importance", 1 + ROUNDING), ("tokens", math.inf)):
        if any(bool(((part < 0) | (part > limit)).any()) for part in vectors[name]):
            raise InvalidReplyError(f"{name} is outside [0, {limit:g}]")
    usage = [float(part.sum()) for part in vectors["usage"]]
    if any(total and abs(total - 1) > ROUNDING for total in usage):  # 0: the layer saw no tokens
        raise InvalidReplyError("usage of a layer does not add up to 1")
    tokens = [float(part.sum()) for part in vectors["tokens"]]
    if any(total > most for total, most in zip(tokens, pairs, strict=True)):
        raise InvalidReplyError("says that it saw more tokens than its steps can have")


def _whole(facts: ConfigRecord, key: str, low: int, high: int) -> int:
    value: Any = facts.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidReplyError(f"{key} is not a whole number in [{low}, {high}]")
    return value


def _positive(facts: ConfigRecord, key: str, high: float) -> float | None:
    value: Any = facts.get(key)
    if value is None:
        return None
    if not isinstance(value, float) or not 0 < value <= high:
        raise InvalidReplyError(f"{key} is not a number in (0, {high:g}]")
    return value


def _share(facts: ConfigRecord, key: str) -> float | None:
    value: Any = facts.get(key)
    if value is None:
        return None
    if not isinstance(value, float) or not 0 <= value <= 1:
        raise InvalidReplyError(f"{key} is not a number in [0, 1]")
    return value


def _loss(facts: ConfigRecord, key: str) -> float:
    value: Any = facts.get(key)
    if not isinstance(value, float) or not math.isfinite(value):
        raise InvalidReplyError(f"{key} is not a finite number")
    return value


def _losses(facts: ConfigRecord) -> dict[str, float]:
    """The losses of a client's steps by name."""
    values: Any = facts.get("step_losses")
    if not isinstance(values, list) or len(values) != len(LOSSES):
        raise InvalidReplyError("it does not say the losses of its steps")
    for name, value in zip(LOSSES, values, strict=True):
        if not isinstance(value, float) or not math.isfinite(value):
            raise InvalidReplyError(f"{name} is not a finite number")
    return dict(zip(LOSSES, values, strict=True))


def _seconds(facts: ConfigRecord) -> float:
    value: Any = facts.get("seconds")
    if not isinstance(value, float) or not 0 <= value < 1e9:
        raise InvalidReplyError("its training time is not a number of seconds")
    return value
