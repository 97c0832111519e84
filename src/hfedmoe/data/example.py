"""The example that a row becomes: a prompt text and its answer."""

from dataclasses import dataclass, field

from hfedmoe.data.rows import short


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt text and its answer.

    The answer is one of `choices` (`answer` is its index) or, without choices, `completion`. A conversation also has
    `messages`: roles and texts, up to the answer, which is the completion. The tokenizer's chat template writes them.
    `origin` names file and line in errors.
    """

    text: str
    choices: tuple[str, ...] = ()
    answer: int = -1
    completion: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    extras: tuple[str, ...] = ()
    """Other fields of each message (reasoning, tool calls), as JSON; empty: no message has any."""
    tools: str = ""
    """The tools that a conversation may call, as JSON; empty: none."""
    origin: str = field(default="", compare=False, repr=False)

    def __str__(self) -> str:
        return self.origin or f"example {short(self.text)}"
