"""Read a configuration from TOML with overrides; every error is one line."""

import difflib
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from hfedmoe.config.run import RunConfig
from hfedmoe.errors import UserError
from hfedmoe.files.lfs import IS_POINTER, is_pointer


def load_config(path: Path | None, overrides: list[str] | None = None) -> RunConfig:
    """Read a TOML file (None: the defaults), apply `section.key=value` overrides and validate.

    The config.toml of a run folder can be read like any other: its `versions` are ignored.

    Raises:
        UserError: the file is missing or not TOML, a key is unknown, or a value is of the wrong type or range.
    """
    if path is None:
        return config_from_text("", "config", overrides)
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows may add a byte-order mark
    except FileNotFoundError:
        raise UserError(f"config {path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"config {path}: is a folder; name a TOML file") from None
    except UnicodeDecodeError:
        raise UserError(f"config {path}: is not text in UTF-8; save it in UTF-8") from None
    except OSError as error:
        raise UserError(f"config {path}: cannot be read ({error.strerror})") from None
    return config_from_text(text, f"config {path}", overrides)


def config_from_text(text: str, origin: str, overrides: list[str] | None = None) -> RunConfig:
    """As `load_config`, from the text of a TOML file that `origin` names in errors. Raises UserError."""
    try:
        tree: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        reason = IS_POINTER if is_pointer(text.encode("utf-8", "replace")) else f"not valid TOML: {error}"
        raise UserError(f"{origin}: {reason}") from None
    except RecursionError:  # as a server may send it
        raise UserError(f"{origin}: is nested too deep") from None
    tree.pop("versions", None)
    for override in overrides or []:
        apply_override(tree, override)
    apply_unset(tree, origin)
    return config_from_tree(tree, origin)


def config_from_tree(tree: dict[str, Any], origin: str, overrides: list[str] | None = None) -> RunConfig:
    """Apply `section.key=value` overrides to a plain tree and validate it; `origin` names it in errors.

    Raises:
        UserError: a key is unknown, or a value is of the wrong type or range.
    """
    for override in overrides or []:
        apply_override(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{origin}: {_one_line(error)}") from None


def apply_unset(tree: dict[str, Any], origin: str) -> None:
    """Set the keys listed under `unset` to None, which TOML cannot write: `unset = ["data.test_rows"]`.

    Raises:
        UserError: an entry goes through something that is not a section.
    """
    unset = tree.pop("unset", [])
    for key in unset if isinstance(unset, list) else [unset]:
        *sections, last = str(key).split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise UserError(f"{origin}: unset: {key}: {section} is not a section; remove the entry")
        node[last] = None


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set what `section.key=value` says in a plain tree. Raises UserError."""
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise UserError(f"--set {override}: expected section.key=value, for example --set train.lr=1e-3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string, so that --set model.name=smollm2 needs no quotes
    node = tree
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {override}: {part} is a value, not a section")
        node = child
    node[parts[-1]] = value


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    # pydantic adds the tried member of a union ("int", "str") to the path; show only real keys.
    where = ".".join(str(part) for part in first["loc"] if str(part) not in {"int", "float", "str", "constrained-str"})
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"unknown key{_suggestion(where)}"
    elif "input" in first and not isinstance(first["input"], dict | BaseModel):
        message = f"{message} (got {first['input']!r})"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {message}{more}" if where else f"{message}{more}"


def _suggestion(where: str) -> str:
    """The nearest key of the same section, as a hint."""
    model: type[BaseModel] = RunConfig
    *sections, last = where.split(".")
    for section in sections:
        field = model.model_fields.get(section)
        candidates = [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if inner is None:
            return ""
        model = inner
    close = difflib.get_close_matches(last, list(model.model_fields), n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(model.model_fields)}"
