"""Write a conversation as text: the prompt, and the answer with the end of its turn."""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any

from hfedmoe.config import DataConfig
from hfedmoe.data.example import Example
from hfedmoe.errors import UserError

Message = tuple[str, str]
"""Role (system, user, assistant, tool) and text."""

NAMES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
MARK = "(the answer begins here)"
WAY_OUT = 'set data.chat = "plain" (--set data.chat=plain), or use a tokenizer with another template'


@dataclass(frozen=True)
class ChatForm:
    """How the tokenizer's chat template is called."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Passed to the template (`data.chat_arguments`)."""
    date: str | None = None
    """The date that the template writes as today's, YYYY-MM-DD (`data.chat_date`); None: today."""

    @classmethod
    def of(cls, config: DataConfig) -> "ChatForm":
        """From section [data]."""
        return cls(config.chat_arguments or {}, config.chat_date)

    def call(self, example: Example) -> dict[str, Any]:
        """The arguments of `apply_chat_template` other than the messages."""
        arguments = dict(self.arguments)
        if example.tools:
            arguments["tools"] = json.loads(example.tools)
        return arguments

    def dated(self, template: str) -> str:
        """The template with a `strftime_now` of its own, which writes the day `date` (not None) and midnight.

        A macro hides the function that transformers gives to templates, by whatever name a template calls it.
        """
        return _date_macro(str(self.date)) + template


@lru_cache(maxsize=4)  # a run has one date, and asks for every row
def _date_macro(day: str) -> str:
    fixed = datetime.fromisoformat(day)
    written = "form"
    for letter in DIRECTIVES:
        for directive in (f"%-{letter}", f"%{letter}"):
            written += f" | replace({directive!r}, {fixed.strftime(directive)!r})"
    # The empty expression keeps the white space at the template's beginning.
    return f"{{% macro {DATED}(form) %}}{{{{ {written} }}}}{{% endmacro %}}{{{{ '' }}}}"


DIRECTIVES = "aAbBcdDeFgGhHIjmMnpPrRSTuUVwWxXyYzZ"
DATED = "strftime_now"
"""A template that writes today's date contains this."""
_THOUGHT = r"[\w:]*(?:think|thought|reason)[\w:]*"
EMPTY_THOUGHT = re.compile(
    rf"\s*(?:<(?P<a>{_THOUGHT})>\s*</(?P=a)>|\[(?P<b>{_THOUGHT})\]\s*\[/(?P=b)\]"
    rf"|<\|(?:start|begin|begin_of)_(?P<c>{_THOUGHT})\|>\s*<\|(?:end|end_of)_(?P=c)\|>)\s*",
    re.IGNORECASE,
)
"""A pair of tags for reasoning with nothing between them, as model families write them."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names for the reasoning of an answer; if a message has one, transformers passes it to the template under all."""


def render(tokenizer: Any, example: Example, form: ChatForm) -> tuple[str, str]:
    """Write a conversation that ends with an answer, with the tokenizer's chat template.

    Returns:
        The prompt, and the answer with everything that the template puts after it. Joined, they are the template's
        text of the whole conversation. The header of the answer belongs to the prompt, also if the template writes it
        only together with an answer: the model should not learn it. So does an empty block of reasoning, which some
        templates put before an answer.

    Raises:
        UserError: the tokenizer has no template; the template refuses the conversation or drops a part of it; or the
            template changes the prompt when the answer is there.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise UserError(
            "the tokenizer has no chat template; if its model has one, the file chat_template.jinja is missing here: "
            f"download the whole folder; else {WAY_OUT}"
        )
    turns, arguments = _turns(example), form.call(example)
    if form.date is not None:
        chosen = tokenizer.get_chat_template(tools=arguments.get("tools"))
        if DATED in chosen:
            arguments["chat_template"] = form.dated(chosen)

    def write(messages: list[dict[str, Any]], **more: Any) -> str:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **(arguments | more))
        return text

    try:
        whole = write(turns)
        prompt = write(turns[:-1], add_generation_prompt=True)
        if not whole[len(prompt) :].lstrip().startswith(str(turns[-1]["content"] or "").strip()):
            begun = _with_header(write, turns, prompt)
            prompt = begun if whole.startswith(begun) else prompt
    except Exception as error:  # a template may raise anything, for example when roles do not alternate
        raise UserError(f"the tokenizer's chat template refuses a conversation ({_line(error)}); {WAY_OUT}") from None
    if not whole.startswith(prompt) or whole == prompt:
        raise UserError(f"the tokenizer's chat template changes the prompt when the answer is added; {WAY_OUT}")
    _check_written(write, turns, example, whole)
    thought = EMPTY_THOUGHT.match(whole, len(prompt))
    if thought is not None and not EMPTY_THOUGHT.match(example.completion):
        prompt = whole[: thought.end()]
    return prompt, whole[len(prompt) :]


def _turns(example: Example) -> list[dict[str, Any]]:
    """The messages in the form that templates expect."""
    turns: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in example.messages]
    for turn, extra in zip(turns, example.extras, strict=False):
        turn |= json.loads(extra) if extra else {}
    return turns


def _check_written(write: Callable[..., str], turns: list[dict[str, Any]], example: Example, whole: str) -> None:
    """Raise UserError if a part of the conversation makes no difference to the text: the template would drop it.

    Reasoning is asked of the answer only: templates leave out that of earlier turns on purpose.
    """
    without: dict[str, Callable[[], str]] = {}
    thought = next((name for name in REASONING if turns[-1].get(name)), None)
    if thought is not None:
        without[thought] = lambda: write([*turns[:-1], _less(turns[-1], REASONING)])
    if any(turn.get("tool_calls") for turn in turns):
        without["tool_calls"] = lambda: write([_less(turn, ("tool_calls",)) for turn in turns])
    if example.tools:
        without["tools"] = lambda: write(turns, tools=None)
    for name, text_without in without.items():
        try:
            dropped = text_without() == whole
        except Exception:  # the template needs it
            continue
        if dropped:
            raise UserError(
                f'the conversation has "{name}", which the tokenizer\'s chat template does not know and would drop; '
                "remove it, or use a tokenizer whose template knows it"
            )


def _less(turn: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in turn.items() if key not in names}


def _with_header(write: Callable[..., str], turns: list[dict[str, Any]], prompt: str) -> str:
    """The prompt with the header of the answer, if the template ignores `add_generation_prompt`; else as it was."""
    if prompt != write(turns[:-1]):
        return prompt
    marked = write([*turns[:-1], turns[-1] | {"content": MARK}])
    begins = marked.find(MARK)
    return marked[:begins] if begins >= 0 else prompt


def plain_prompt(messages: Sequence[Message]) -> str:
    """The messages before an answer, one paragraph per turn, for models without a chat template."""
    return "\n\n".join(f"{NAMES[role]}: {content.strip()}" for role, content in messages)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
