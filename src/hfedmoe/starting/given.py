"""What the user of `hfedmoe init` says with `--set`."""

import copy
from typing import Any

from hfedmoe.config import apply_unset, config_from_tree
from hfedmoe.config.reading import apply_override
from hfedmoe.data.decoding import Form
from hfedmoe.errors import UserError
from hfedmoe.starting.rows import Seen, look

OF_COLUMNS = ("text", "label", "choices", "answer", "completion", "format")
ELSEWHERE = {
    "data.source": "name the file as an argument",
    "data.clients": "name the files as arguments",
    "model.name": "use --model",
}


def given_tree(overrides: list[str] | None) -> dict[str, Any]:
    """The settings that `--set` asks for, as a tree. Raises UserError if one is not valid."""
    tree: dict[str, Any] = {}
    for override in overrides or []:
        key = override.partition("=")[0].strip()
        if key in ELSEWHERE:
            raise UserError(f"--set {key}: {ELSEWHERE[key]}")
        apply_override(tree, override)
    checked = copy.deepcopy(tree)
    apply_unset(checked, "--set")
    config_from_tree(checked, "--set")
    return tree


def look_at(files: list[str], given: dict[str, Any]) -> Seen:
    """`rows.look` with the user's columns and form of the files. Raises UserError."""
    own = given.get("data", {})
    columns = {key: str(own[key]) for key in OF_COLUMNS if key in own}
    return look(files, Form(own.get("encoding"), own.get("delimiter")), columns)
