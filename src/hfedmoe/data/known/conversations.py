"""Instruction data: every answer of the assistant is an example, with what came before it as the prompt."""

from collections.abc import Collection
from typing import Any

from hfedmoe.data.chat import Message, plain_prompt
from hfedmoe.data.example import Example
from hfedmoe.data.known.base import KnownSet, Row, Wording
from hfedmoe.data.rows import short
from hfedmoe.errors import UserError

SPEAKERS = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
"""Names in lower case, and their roles. What a tool says is context, like what a user says."""

TURNS = ("messages", "conversations", "conversation")
REQUESTS = (
    # What is asked, what it is about, what is answered.
    ("instruction", ("input", "context"), ("output", "response")),
    ("prompt", (), ("completion", "response")),
)
SCHEMAS = (
    '"messages" or "conversations" with "role" and "content" or "from" and "value"; "instruction" with "output" or '
    '"response" (and "input" or "context"); "prompt" with "completion" or "response"'
)


def _examples(row: Row, wording: Wording) -> list[Example]:
    column, messages = _messages(row)
    if all(role != "assistant" for role, _ in messages[1:]):
        raise row.error(column, "has no answer of the assistant to a message before it; remove the row")
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


def _has_conversation(names: Collection[str]) -> bool:
    """Whether a table with these columns may hold conversations."""
    asked = any(asks in names and any(name in names for name in answers) for asks, _, answers in REQUESTS)
    return asked or any(column in names for column in TURNS)


def _messages(row: Row) -> tuple[str, list[Message]]:
    """The conversation as roles and texts, from any of the schemas, and the column that it is in."""
    for column in TURNS:
        if row.holds(column):
            return column, _turns(row, column)
    for asks, abouts, answers in REQUESTS:
        answer = next((name for name in answers if row.holds(name)), None)
        if not row.holds(asks) or answer is None:
            continue
        if isinstance(row.cell(asks), list):  # TRL writes both as lists of messages
            return answer, _turns(row, asks) + _turns(row, answer)
        request = row.text(asks)
        about = next((row.text(name, empty=True) for name in abouts if row.holds(name)), "")
        if about.strip():
            request = f"{request}\n\n{about}"
        return answer, [("user", request), ("assistant", row.text(answer, empty=True))]
    present = ", ".join(row.rows.names) or "none"
    raise UserError(f"{row.rows.at(row.index)}: no conversation in the columns {present}; it may be {SCHEMAS}")


def _turns(row: Row, column: str) -> list[Message]:
    turns = row.cell(column)
    if not isinstance(turns, list) or not turns:
        raise row.error(column, f"must be a list of messages, got {short(turns)}")
    return [_message(row, column, turn) for turn in turns]


def _message(row: Row, column: str, turn: Any) -> Message:
    who, what = ("from", "value") if isinstance(turn, dict) and "from" in turn else ("role", "content")
    if not isinstance(turn, dict) or not isinstance(turn.get(what), str):
        raise row.error(
            column,
            f'must hold objects with "role" and "content", or "from" and "value", as text, got {short(turn)}',
        )
    role = SPEAKERS.get(str(turn.get(who)).strip().lower())
    if role is None:
        known = ", ".join(SPEAKERS)
        raise row.error(column, f'has "{who}": {short(turn.get(who))}; rename it to one of {known}, or remove the row')
    return role, turn[what]


INSTRUCTIONS = KnownSet(
    name="instructions",
    kind="completion",
    hub="HuggingFaceTB/smoltalk",
    subset="everyday-conversations",
    columns=TURNS,
    has_columns=_has_conversation,
    optional=("instruction", "input", "context", "output", "response", "prompt", "completion"),
    examples=_examples,
    template="{text}\n\nAssistant:",
)
