"""Prompt templates."""

from hfedmoe.config import DataConfig
from hfedmoe.data.known import KnownSet
from hfedmoe.errors import UserError

TEMPLATES: dict[str, str] = {
    "classification": "News: {text}\nTopic:",
    "choices": "Question: {text}\nAnswer:",
    "completion": "{text}",
}
"""Kind -> template, if neither the configuration nor a known data set has one."""


def template_of(config: DataConfig, known: KnownSet | None, kind: str | None = None) -> str:
    """The prompt template of a task; `kind` is needed if `data.format` is "auto"."""
    if config.template is None:
        return TEMPLATES.get(kind or config.format, TEMPLATES["classification"]) if known is None else known.template
    if known is not None and known.name == "instructions" and config.chat == "template":
        raise UserError(
            "data.template: conversations are written by the tokenizer's chat template; leave it out, or set "
            'data.chat = "plain"'
        )
    return config.template
