"""Nothing from a client is trusted: each lie is answered by name."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import Message, Metadata, RecordDict
from torch import Tensor

from hfedmoe import __version__
from hfedmoe.config import MethodConfig
from hfedmoe.events import Work
from hfedmoe.files.blob import loads
from hfedmoe.server.fold import Fold
from hfedmoe.wire import checks
from hfedmoe.wire.messages import (
    Description,
    InvalidReplyError,
    Update,
    describe_reply,
    describe_request,
    facts_of,
    pack_bits,
    record,
    train_reply,
)
from hfedmoe.wire.requests import OtherVersionError, check_version
from hfedmoe.wire.same import Digests

ABOUT = Description(client=0, name="pi", examples=10, budget=3, num_experts=[2, 2])


def message(content: RecordDict) -> Any:
    metadata = Metadata(1, "1", 1, 0, "", "", 0.0, 60.0, "query")
    return Message(content, metadata=metadata)  # type: ignore[call-overload]


def test_another_version_is_named_by_both_sides() -> None:
    reply = describe_reply(ABOUT)
    for theirs, shown in (("0.0.9\n\x1b", "0.0.9"), (None, "an earlier one"), (7, "an earlier one")):
        facts = dict(reply["facts"]) | {"version": theirs}  # type: ignore[call-overload]
        other = record({key: value for key, value in facts.items() if value is not None})
        with pytest.raises(
            InvalidReplyError, match=rf"another version of hfedmoe: {shown}; the server has {__version__}"
        ):
            checks.description(message(other), [2, 2])
        with pytest.raises(
            OtherVersionError, match=rf"the server has another version of hfedmoe: {shown}; this device"
        ):
            check_version(message(other))
    check_version(message(describe_request("{}")))


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ({"name": "a\x1b[31mb"}, "name is not a short text"),
        ({"name": "x" * 81}, "name is not a short text"),
        ({"num_experts": [2, 3]}, "another number of experts"),
        ({"examples": 0}, "examples is not"),
        ({"client": -1}, "client is not"),
        ({"budget": 5}, "budget is not"),
        ({"budget": 0}, "budget is not"),
    ],
)
def test_descriptions_are_checked(lie: dict[str, Any], reason: str) -> None:
    assert checks.description(message(describe_reply(ABOUT)), [2, 2]) == ABOUT
    with pytest.raises(InvalidReplyError, match=reason):
        checks.description(message(describe_reply(replace(ABOUT, **lie))), [2, 2])


def test_plans_are_checked() -> None:
    def planned(*layers: list[int]) -> list[list[bool]]:
        bits = pack_bits([torch.tensor(layer, dtype=torch.bool) for layer in layers])
        found = checks.plan(message(record({"resident": bits})), checks.Room([2, 2], [1, 1], budget=3)).resident
        return [mask.tolist() for mask in found]

    assert planned([1, 0], [1, 1]) == [[True, False], [True, True]]
    with pytest.raises(InvalidReplyError, match="plans 0 experts in layer 1, fewer than 1"):
        planned([1, 1], [0, 0])
    with pytest.raises(InvalidReplyError, match="plans 4 experts, more than its budget of 3"):
        planned([1, 1], [1, 1])


def lie(name: str, *values: float) -> dict[str, list[Tensor]]:
    return {name: [torch.tensor(values)]}


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (lie("usage", 1.1, -0.1), "usage is outside"),
        (lie("usage", 0.9, 0.9), "usage of a layer does not add up to 1"),
        (lie("usage", math.nan, 0.1), "usage is not finite"),
        (lie("importance", -0.1, 0.1), "importance is outside"),
        (lie("importance", 1.1, 0.1), "importance is outside"),
        (lie("tokens", -1.0, 0.1), "tokens is outside"),
        (lie("tokens", 6.0, 5.0), "more tokens than its steps"),
        ({"tensors": {"shared.x": torch.tensor([-1e7])}}, "has values over"),
        ({"tensors": {"shared.x": torch.zeros(1_000_000)}}, "bytes of tensors where at most"),
        ({"work": {"seconds": math.nan}}, "training time"),
        ({"work": {"seconds": -1.0}}, "training time"),
        ({"work": {"first_loss": math.nan}}, "first_loss is not a finite number"),
        ({"work": {"last_loss": math.inf}}, "last_loss is not a finite number"),
        ({"work": {"mean_loss": math.nan}}, "mean_loss is not a finite number"),
        ({"work": {"mean_loss": None}}, "does not say the losses of its steps"),
        ({"work": {"steps": 2}}, "steps is not a whole number"),
        ({"work": {"deadline_s": 3.0}}, "does not say how many experts its steps trained"),
    ],
)
def test_updates_are_checked(lie: dict[str, Any], reason: str) -> None:
    halves, flags = [torch.full((2,), 0.5)], [torch.ones(2, dtype=torch.bool)]
    work = Work(
        examples=10, steps=1, steps_wanted=1, first_loss=1.0, last_loss=1.0, mean_loss=1.0, seconds=2.0, peak_bytes=5
    )
    honest = Update({"shared.x": torch.ones(1)}, flags, flags, halves, halves, halves, work)

    def checked(update: Update) -> Update:
        asked = checks.Asked(steps=1, pairs=[10])
        return checks.update(message(train_reply(update)), flags, {"shared.x": torch.ones(1)}, asked)

    assert checked(honest).work == work
    assert checked(replace(honest, usage=[torch.zeros(2)], tokens=[torch.tensor([4.0, 6.0])])).work.steps == 1
    if "work" in lie:
        lie = {"work": replace(work, **lie["work"])}
    with pytest.raises(InvalidReplyError, match=reason):
        checked(replace(honest, **lie))


def test_headers_are_bounded_before_they_are_parsed() -> None:
    nested = ("[" * 900 + "]" * 900).encode()
    header = b'{"a":' + nested * 1 + b"}"
    header += b" " * (-len(header) % 8)
    blob = len(header).to_bytes(8, "little") + header
    with pytest.raises(ValueError, match="is not described as a tensor"):
        loads(blob)
    with pytest.raises(ValueError, match=r"its header has \d+ bytes; at most 1000 are allowed"):
        loads(blob, 1000)


def test_an_update_has_room_for_the_names_it_must_have_and_no_more() -> None:
    halves, flags = [torch.full((2,), 0.5)], [torch.ones(2, dtype=torch.bool)]
    work = Work(examples=10, steps=1, steps_wanted=1, first_loss=1.0, last_loss=1.0, mean_loss=1.0)
    many = {f"shared.{number}": torch.zeros(0) for number in range(2000)}
    update = Update(many, flags, flags, halves, halves, halves, work)
    with pytest.raises(InvalidReplyError, match="its header has"):
        checks.update(message(train_reply(update)), flags, {"shared.x": torch.ones(1)}, checks.Asked(1, [10]))


def test_facts_are_bounded() -> None:
    for facts in ({f"f{number}": 1 for number in range(100)}, {"name": "x" * (1 << 25)}):
        with pytest.raises(InvalidReplyError, match="facts of"):
            facts_of(message(record(facts)))


def test_products_that_would_lock_everybody_out_are_refused() -> None:
    """A of the next round keeps its norm, so B holds the whole product: 1e6 x 1e6 must not pass."""
    like = {"experts.0.up_a": torch.full((2, 1, 4), 0.5), "experts.0.up_b": torch.zeros(2, 3, 1)}
    flags, halves = [torch.tensor([True, False])], [torch.full((2,), 0.5)]
    work = Work(examples=10, steps=1, steps_wanted=1, first_loss=1.0, last_loss=1.0, mean_loss=1.0)

    def checked(a: float, b: float, exact: bool = True) -> Update:
        tensors = {"experts.0.up_a": torch.full((1, 1, 4), a), "experts.0.up_b": torch.full((1, 3, 1), b)}
        update = Update(tensors, flags, flags, halves, halves, halves, work)
        return checks.update(message(train_reply(update)), flags, like, checks.Asked(1, [10], exact=exact))

    # norms: A 2 a, B sqrt(3) b; scale: norm of the earlier A over the root of the rank = 1
    checked(1.0, 0.99e6 / 12**0.5)
    with pytest.raises(InvalidReplyError, match=r"the product of experts\.0\.up_a"):
        checked(1.0, 1.01e6 / 12**0.5)
    with pytest.raises(InvalidReplyError, match=r"the product of experts\.0\.up_a"):
        checked(0.9e6, 0.9e6)
    checked(0.9e6, 0.9e6, exact=False)
    fold = Fold(like, MethodConfig(), exact_lora=True, rank=1)
    for sign in (1.0, -0.5):
        fold.add(checked(1.0, sign * 0.99e6 / 12**0.5), flags, 10)
    assert max(float(tensor.abs().max()) for tensor in fold.result().values()) <= checks.MAX_VALUE


def test_another_base_model_or_tokenizer_is_refused() -> None:
    own = Description(0, "client 0", 10, 4, [2, 2], Digests("aa", "cc"))
    assert checks.description(message(describe_reply(own)), [2, 2], Digests("aa", "cc")) == own
    with pytest.raises(InvalidReplyError, match="its base model is not the server's"):
        checks.description(message(describe_reply(own)), [2, 2], Digests("bb", "cc"))
    with pytest.raises(InvalidReplyError, match="its tokenizer is not the server's"):
        checks.description(message(describe_reply(own)), [2, 2], Digests("aa", "dd"))
