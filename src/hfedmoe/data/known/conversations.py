"""Instruction data: every answer of the assistant is an example; the messages before it are its prompt."""

import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from hfedmoe.data.chat import REASONING, plain_prompt
from hfedmoe.data.example import Example
from hfedmoe.data.known.known_set import KnownSet, Row, Wording
from hfedmoe.data.rows import short
from hfedmoe.errors import UserError

SPEAKERS = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
"""Lower-case name -> role. Messages of tools are context, like those of users."""

EXTRAS = (*REASONING, "tool_calls", "tool_call_id", "name")
"""Other fields that a message may have besides role and text, for templates that know them."""

REFUSED = ("function_call", "thoughts", "image", "images", "audio", "video")
"""Parts of a message that no template gets here."""
ROW_REFUSED = ("history", "functions", "chat_template_kwargs", "images", "videos", "audios")
"""Parts of a row that would change what is asked."""
TURNS = ("messages", "conversations", "conversation")
REQUESTS = (
    # Columns of the request, of more context for it, and of the answer.
    ("instruction", ("input", "context"), ("output", "response")),
    ("prompt", (), ("completion", "response")),
)
SCHEMAS = (
    '"messages" or "conversations" with "role" and "content" or "from" and "value"; "instruction" with "output" or '
    '"response" (and "input" or "context"); "prompt" with "completion" or "response"'
)


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str
    extra: str = ""
    """Reasoning and tool calls, as JSON for the template."""
    learn: bool = True
    """Whether an answer is learned; with `"weight": 0` it is only context."""

    @property
    def answers(self) -> bool:
        """Whether it is an answer to learn."""
        return self.role == "assistant" and self.learn and bool(self.content.strip() or self.extra)


def _examples(row: Row, wording: Wording) -> list[Example]:
    for name in ROW_REFUSED:
        if row.holds(name) and row.cell(name):
            raise row.error(name, "is a part of the conversation that cannot be used here; remove it or the row")
    column, turns = _conversation(row)
    if row.holds("system") and row.text("system", empty=True).strip():
        turns = [Turn("system", row.text("system")), *turns]
    if row.holds("weight") and not _learned(row, "weight", row.cell("weight")):
        turns = [replace(turn, learn=False) for turn in turns]
    if wording.merge_system:
        turns = _merged(row, column, turns)
    if all(turn.role != "assistant" for turn in turns[1:]):
        raise row.error(column, "has no answer of the assistant after the first message; remove the row")
    tools = _tools(row)
    extras = [turn.extra for turn in turns]
    if wording.plain and (tools or any(extras)):
        raise row.error(
            column, 'has tools, tool calls or reasoning, which data.chat = "plain" cannot write; remove them'
        )
    examples = []
    for end, turn in enumerate(turns):
        # A few rows of Alpaca have an empty answer: nothing to learn from.
        if not turn.answers or end == 0:
            continue
        messages = [(own.role, own.content) for own in turns[: end + 1]]
        if wording.plain:
            examples.append(Example(plain_prompt(messages[:end]), completion=turn.content.strip()))
            continue
        own = tuple(extras[: end + 1]) if any(extras[: end + 1]) else ()
        examples.append(
            Example(messages[end - 1][1], completion=turn.content, messages=tuple(messages), extras=own, tools=tools)
        )
    return examples


def _merged(row: Row, column: str, turns: list[Turn]) -> list[Turn]:
    """Each system message becomes part of the user turn behind it. Raises UserError if there is none."""
    merged: list[Turn] = []
    waiting: list[str] = []
    for turn in turns:
        if turn.role == "system":
            waiting.append(turn.content)
        elif waiting and turn.role == "user":
            merged.append(replace(turn, content="\n\n".join([*waiting, turn.content])))
            waiting = []
        elif waiting:
            raise row.error(column, "has a system message without a user turn behind it to merge it into; remove it")
        else:
            merged.append(turn)
    if waiting:
        raise row.error(column, "ends with a system message, which cannot be merged into a user turn; remove it")
    return merged


def _tools(row: Row) -> str:
    """The tools of a conversation, as JSON; empty: it has none."""
    tools = row.cell("tools") if row.holds("tools") else None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError:
            raise row.error("tools", f"must be a list of tools or JSON of one, got {short(tools)}") from None
    if tools and not isinstance(tools, list):
        raise row.error("tools", f"must be a list of tools, got {short(tools)}")
    return json.dumps(tools) if tools else ""


def _has_conversation(names: Collection[str]) -> bool:
    """Whether a table with these columns may hold conversations."""
    asked = any(asks in names and any(name in names for name in answers) for asks, _, answers in REQUESTS)
    return asked or any(column in names for column in TURNS)


def _conversation(row: Row) -> tuple[str, list[Turn]]:
    """The column of the conversation, and its messages, from any of the schemas."""
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
        return answer, [Turn("user", request), Turn("assistant", row.text(answer, empty=True))]
    present = ", ".join(row.rows.names) or "none"
    raise UserError(f"{row.rows.at(row.index)}: no conversation in the columns {present}; it may be {SCHEMAS}")


def _turns(row: Row, column: str) -> list[Turn]:
    turns = row.cell(column)
    if not isinstance(turns, list) or not turns:
        raise row.error(column, f"must be a list of messages, got {short(turns)}")
    return [_turn(row, column, turn) for turn in turns]


def _turn(row: Row, column: str, turn: Any) -> Turn:
    who, what = ("from", "value") if isinstance(turn, dict) and "from" in turn else ("role", "content")
    extra = {key: turn[key] for key in EXTRAS if turn.get(key)} if isinstance(turn, dict) else {}
    content = turn.get(what) if isinstance(turn, dict) else None
    if content is None and "tool_calls" in extra:
        content = ""  # a call has no text of its own
    if not isinstance(turn, dict) or not isinstance(content, str):
        raise row.error(
            column,
            f'must hold objects with "role" and "content", or "from" and "value", as text, got {short(turn)}',
        )
    role = SPEAKERS.get(str(turn.get(who)).strip().lower())
    if role is None:
        known = ", ".join(SPEAKERS)
        raise row.error(column, f'has "{who}": {short(turn.get(who))}; rename it to one of {known}, or remove the row')
    unused = next((key for key in REFUSED if turn.get(key)), None)
    if unused is not None:
        raise row.error(column, f'has "{unused}" in a message, which cannot be used here; remove it or the row')
    learn = _learned(row, column, turn.get("weight")) and turn.get("train") is not False
    return Turn(role, content, json.dumps(extra) if extra else "", learn)


def _learned(row: Row, column: str, weight: Any) -> bool:
    """Whether answers of this weight are learned. Raises UserError unless it is 0, 1 or nothing."""
    if weight is None or weight == "":
        return True
    if str(weight) not in ("0", "1", "0.0", "1.0"):
        raise row.error(column, f'has "weight": {short(weight)}; 1 learns an answer and 0 does not')
    return float(weight) == 1


INSTRUCTIONS = KnownSet(
    name="instructions",
    kind="completion",
    hub="HuggingFaceTB/smoltalk",
    subset="everyday-conversations",
    columns=TURNS,
    has_columns=_has_conversation,
    optional=(
        "tools",
        "system",
        "weight",
        *ROW_REFUSED,
        "instruction",
        "input",
        "context",
        "output",
        "response",
        "prompt",
        "completion",
    ),
    examples=_examples,
    template="{text}\n\nAssistant:",
)
