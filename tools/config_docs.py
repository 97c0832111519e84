"""Write docs/configuration.md from the descriptions in `hfedmoe.config`.

    python tools/config_docs.py [--check]

With `--check` nothing is written, and the exit code is 1 if the file is not up to date.
"""

import sys
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from hfedmoe.config import RunConfig, Section
from hfedmoe.config.named import NamedIn

TARGET = Path(__file__).parents[1] / "docs" / "configuration.md"
HEAD = """# Configuration

<!-- Written by tools/config_docs.py from src/hfedmoe/config/: change it there. -->

A config is a TOML file. Every setting has a default, so a config only needs the settings that differ.
`configs/demo.toml` is the built-in example, and `configs/tiny.toml` runs in seconds. Any setting can be changed for one
run on the command line, and `--show-config` prints the whole tree without running anything:

```console
$ hfedmoe run configs/tiny.toml --set train.lr=1e-3 --set 'clients.budgets=["25%", 16]' --show-config
```

A misspelt or unknown key is an error. TOML cannot write None; to set a setting to None, list it in the top-level key
`unset`: `unset = ["data.test_rows"]`. The `config.toml` of a run folder is a config like any other.
"""
BOUNDS: dict[type, tuple[str, str]] = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}


def page() -> str:
    """The whole page."""
    sections = [HEAD, "## Top level", "", *_table(RunConfig)]
    for name, field in RunConfig.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None:
            sections += _section(name, inner)
    return "\n".join(sections) + "\n"


def _section(path: str, model: type[Section]) -> list[str]:
    lines = ["", f"## `[{path}]`", "", model.__doc__ or "", "", *_table(model)]
    for name, field in model.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None:
            lines += _section(f"{path}.{name}", inner)
    return lines


def _table(model: type[Section]) -> list[str]:
    rows = [
        f"| `{name}` | {_kind(field)} | {_default(field)} | {(field.description or '').replace('|', '&#124;')} |"
        for name, field in model.model_fields.items()
        if _section_of(field.annotation) is None
    ]
    return ["| key | value | default | meaning |", "|---|---|---|---|", *rows]


def _section_of(annotation: Any) -> type[Section] | None:
    """The section in a field's type, which may also allow None."""
    candidates = [annotation, *get_args(annotation)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def _kind(field: FieldInfo) -> str:
    named = next((item for item in field.metadata if isinstance(item, NamedIn)), None)
    if named is not None:
        return ", ".join(f"`{name}`" for name in named.names())
    bounds = []
    for item in field.metadata:
        if type(item) in BOUNDS:
            attribute, sign = BOUNDS[type(item)]
            bounds.append(f"{sign} {getattr(item, attribute):g}" if item != Lt(2**31) else "< 2^31")
    return ", ".join([_words(field.annotation), *bounds])


def _words(annotation: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (types.UnionType, Union):
        return " or ".join(_words(argument) for argument in arguments if argument is not type(None))
    if origin is list:
        return f"list of {_words(arguments[0])}"
    if origin is dict:
        return "table"
    return {int: "whole number", float: "number", str: "text", bool: "true or false"}[annotation]


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "None"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list):
        return "`[" + ", ".join(_toml(item) for item in value) + "]`"
    return f"`{_toml(value)}`"


def _toml(value: Any) -> str:
    return '"' + value.replace("\n", "\\n") + '"' if isinstance(value, str) else f"{value}"


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        fresh = TARGET.read_text(encoding="utf-8") == page()
        sys.exit(None if fresh else f"{TARGET}: not up to date; run tools/config_docs.py")
    TARGET.write_text(page(), encoding="utf-8")
