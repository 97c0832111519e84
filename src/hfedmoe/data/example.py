"""What a row becomes: a text to prompt with, and what should follow it."""

from dataclasses import dataclass, field

from hfedmoe.data.rows import short


@dataclass(frozen=True, slots=True)
class Example:
    """One row: a text to prompt with and what should follow it.

    Either one of `choices` (`answer` is its index) or, when there are no choices, `completion`. A conversation has
    `messages` as well, roles and texts up to the answer, which is the completion: the tokenizer's chat template makes
    prompt and answer of them. `origin` names file and line in errors.
    """

    text: str
    choices: tuple[str, ...] = ()
    answer: int = -1
    completion: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    extras: tuple[str, ...] = ()
    """Of each message what it has beside role and text (reasoning, tool calls), as JSON; empty: none has anything."""
    tools: str = ""
    """The tools that a conversation may call, as JSON; empty: none."""
    origin: str = field(default="", compare=False, repr=False)

    def __str__(self) -> str:
        return self.origin or f"example {short(self.text)}"
