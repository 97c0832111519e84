"""Conversations as text: what comes before an answer, and the answer with the end of its turn."""

from collections.abc import Sequence
from typing import Any

from hfedmoe.errors import UserError

Message = tuple[str, str]
"""Role (system, user, assistant, tool) and text."""

NAMES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
MARK = "(the answer begins here)"
WAY_OUT = 'set data.chat = "plain" (--set data.chat=plain), or use a tokenizer with another template'


def render(tokenizer: Any, messages: Sequence[Message]) -> tuple[str, str]:
    """A conversation that ends with an answer, in the tokenizer's chat template.

    Returns:
        The prompt, up to where the answer begins, and the answer with everything the template puts behind it. Together
        they are the template's own text of the whole conversation. Where a template cannot write the header of an
        answer by itself, the prompt takes the header that comes with the answer: no model should have to learn it.

    Raises:
        UserError: the tokenizer has no template, the template refuses the conversation, or it writes what comes before
            an answer differently once the answer is there.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"the tokenizer has no chat template; {WAY_OUT}")
    turns = [{"role": role, "content": content} for role, content in messages]
    try:
        whole: str = tokenizer.apply_chat_template(turns, tokenize=False)
        prompt: str = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
        if not whole[len(prompt) :].lstrip().startswith(messages[-1][1].strip()):
            begun = _with_header(tokenizer, turns, prompt)
            prompt = begun if whole.startswith(begun) else prompt
    except Exception as error:  # templates raise what they like, for example when roles do not alternate
        raise UserError(f"the tokenizer's chat template refuses a conversation ({_line(error)}); {WAY_OUT}") from None
    if not whole.startswith(prompt) or whole == prompt:
        raise UserError(f"the tokenizer's chat template writes a prompt differently once it is answered; {WAY_OUT}")
    return prompt, whole[len(prompt) :]


def _with_header(tokenizer: Any, turns: list[dict[str, str]], prompt: str) -> str:
    """The prompt with the header of the answer, if the template does not write that when asked to begin one."""
    if prompt != tokenizer.apply_chat_template(turns[:-1], tokenize=False):
        return prompt
    marked: str = tokenizer.apply_chat_template([*turns[:-1], turns[-1] | {"content": MARK}], tokenize=False)
    begins = marked.find(MARK)
    return marked[:begins] if begins >= 0 else prompt


def plain_prompt(messages: Sequence[Message]) -> str:
    """What was said before an answer, one paragraph a turn, for models without a chat template."""
    return "\n\n".join(f"{NAMES[role]}: {content.strip()}" for role, content in messages)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
