"""Instruction data: every answer of the assistant is an example, with what came before it as the prompt."""

from typing import Any

from hfedmoe.data.chat import Message, plain_prompt
from hfedmoe.data.known.base import KnownSet, Row, Wording
from hfedmoe.data.rows import Example, short

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Names in ShareGPT-like data, and their roles."""


def _examples(row: Row, wording: Wording) -> list[Example]:
    messages = _messages(row)
    if all(role != "assistant" for role, _ in messages):
        raise row.error(_column(row), "has no answer of the assistant")
    examples = []
    for end, (role, content) in enumerate(messages):
        # A few rows of Alpaca have an empty answer: nothing to learn from.
        if role != "assistant" or not content.strip() or end == 0:
            continue
        if wording.plain:
            examples.append(Example(plain_prompt(messages[:end]), completion=content.strip()))
        else:
            asked = messages[end - 1][1]
            examples.append(Example(asked, completion=content, messages=tuple(messages[: end + 1])))
    return examples


def _column(row: Row) -> str:
    return next((name for name in ("messages", "conversations") if row.has(name)), "output")


def _messages(row: Row) -> list[Message]:
    """The conversation as roles and texts, from any of the three schemas."""
    column = _column(row)
    if column == "messages":
        return [_message(row, column, turn, "role", "content") for turn in _turns(row, column)]
    if column == "conversations":
        return [_message(row, column, turn, "from", "value") for turn in _turns(row, column)]
    request = row.text("instruction")
    extra = row.text("input", empty=True) if row.has("input") else ""
    if extra.strip():
        request = f"{request}\n\n{extra}"
    return [("user", request), ("assistant", row.text("output", empty=True))]


def _turns(row: Row, column: str) -> list[Any]:
    turns = row.cell(column)
    if not isinstance(turns, list) or not turns:
        raise row.error(column, f"must be a list of messages, got {short(turns)}")
    return turns


def _message(row: Row, column: str, turn: Any, who: str, what: str) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get(what), str):
        raise row.error(column, f'must hold objects with "{who}" and "{what}", got {short(turn)}')
    role = SPEAKERS.get(str(turn.get(who)))
    if role is None:
        raise row.error(column, f'has "{who}": {short(turn.get(who))}; known: {", ".join(SPEAKERS)}')
    return role, turn[what]


INSTRUCTIONS = KnownSet(
    name="instructions",
    kind="completion",
    hub="HuggingFaceTB/smoltalk",
    subset="everyday-conversations",
    columns=("messages",),
    optional=("conversations", "instruction", "input", "output"),
    examples=_examples,
    template="{text}\n\nAssistant:",
)
