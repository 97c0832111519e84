"""Requests for after the last round: a device answers each kind once in a run, for one model.

A server could else learn about single rows from the answers for many models. The very same request, from a server
that was killed and goes on, gets the same answer again, from the device's memory.
"""

import hashlib

from flwr.app import ConfigRecord, Message, RecordDict

from hfedmoe.wire.messages import FACTS, facts_of
from hfedmoe.wire.requests import InvalidRequestError


def answer_of(state: RecordDict, mark: str, message: Message) -> RecordDict | None:
    """The answer to a request that came before; None: none of its kind came.

    Args:
        mark: one of `lasting.MEASURED` and `lasting.TUNED`.

    Raises:
        InvalidRequestError: the one that came was another one.
    """
    kept = state.config_records.get(mark)
    if kept is None:
        return None
    if kept["request"] != _digest(message):
        raise InvalidRequestError("it has answered in this run already, for another model")
    return RecordDict({FACTS: ConfigRecord(dict(state.config_records[_answer(mark)]))})


def keep_answer(state: RecordDict, mark: str, message: Message, reply: RecordDict) -> None:
    """Remember the answer to a request. It has facts only: numbers, or a code."""
    state[mark] = ConfigRecord({"request": _digest(message)})
    state[_answer(mark)] = ConfigRecord(dict(reply.config_records[FACTS]))


def _answer(mark: str) -> str:
    return f"{mark}/answer"


def _digest(message: Message) -> str:
    """Of all that a request says."""
    found = hashlib.sha256(repr(sorted(facts_of(message).items())).encode())
    for arrays in message.content.array_records.values():
        for array in arrays.values():
            found.update(array.data)
    return found.hexdigest()
