"""A config that is being written: settings with a comment for each, in the order in which they were put."""

import json
import re
from collections.abc import Mapping
from typing import Any

from hfedmoe.config import RunConfig, config_from_text

SECTIONS = ("", "model", "data", "partition", "clients", "method", "train", "federation", "evaluation")
COMMENT_AT = 34
"""Column of the comments, if the setting is not longer."""


class Draft:
    """Settings with comments.

    Args:
        given: the settings that the user asked for, as a tree; they go before what is put.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = _flat(given)
        self._lines: dict[str, tuple[Any, str]] = {}

    def put(self, key: str, value: Any, comment: str = "") -> None:
        """Set `section.key`, unless the user did: then the user's value gets the comment."""
        self._lines[key] = (self._given.get(key, value), comment)

    def drop(self, key: str) -> None:
        """Take a setting back, unless the user gave it."""
        if key not in self._given:
            self._lines.pop(key, None)

    def has(self, key: str) -> bool:
        """Whether the user gave it."""
        return key in self._given

    def config(self) -> RunConfig:
        """The settings, checked. Raises UserError."""
        return config_from_text(self.text([]), "the new config")

    def text(self, head: list[str]) -> str:
        """The file, with comment lines at its top."""
        own = {key: (value, "") for key, value in self._given.items() if key not in self._lines}
        lines = [f"# {_one_line(text)}" if text else "#" for text in head]
        for section in SECTIONS:
            inside = {
                key.rpartition(".")[2] if section else key: entry
                for key, entry in (self._lines | own).items()
                if (key.split(".")[0] == section if section else "." not in key)
            }
            if not inside:
                continue
            lines += ["", f"[{section}]"] if section else [""]
            for name, (value, comment) in inside.items():
                setting = f"{name} = {toml_value(value)}"
                lines.append(f"{setting:<{COMMENT_AT - 2}}  # {_one_line(comment)}" if comment else setting)
        return "\n".join(lines).lstrip("\n") + "\n"


def toml_value(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, Mapping):
        inside = ", ".join(f"{_key(str(key))} = {toml_value(item)}" for key, item in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    # Numbers and strings of JSON are those of TOML, but for one character.
    return json.dumps(value, ensure_ascii=False, default=str).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else toml_value(name)


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """`{"train": {"lr": 1}}` as `{"train.lr": 1}`; deeper tables stay values."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and name in SECTIONS:
            flat |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            flat[name] = value
    return flat


def _one_line(text: str) -> str:
    """A comment without line breaks or characters that nobody sees."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
