"""Settings whose values are the rows of a table elsewhere, so that a new row needs no second place."""

import importlib
from collections.abc import Mapping
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


class NamedIn:
    """A text that must be a key of a table: `Annotated[str, NamedIn("hfedmoe.method.scores", "SCORES")]`.

    The table's module may import torch, so it is only imported where the value is not `usual`, which is known to be
    there; reading a configuration stays fast.

    Raises ValueError, from pydantic, for another text.
    """

    def __init__(self, module: str, table: str, usual: str) -> None:
        self.module, self.table, self.usual = module, table, usual

    def names(self) -> list[str]:
        """All that may be written."""
        table: Mapping[str, Any] = getattr(importlib.import_module(self.module), self.table)
        return list(table)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: str) -> str:
        if value != self.usual and value not in self.names():
            raise ValueError(f"expected one of {', '.join(self.names())}")
        return value
