"""Settings whose allowed values are the keys of a table in another module."""

import importlib
from collections.abc import Mapping
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


class NamedIn:
    """A text that must be a key of a table: `Annotated[str, NamedIn("hfedmoe.method.scores", "SCORES")]`.

    The table's module may import torch. It is only imported if the value is not `usual`, a key that is known to exist,
    so reading a configuration stays fast. Any other text raises pydantic's ValidationError.
    """

    def __init__(self, module: str, table: str, usual: str) -> None:
        self.module, self.table, self.usual = module, table, usual

    def names(self) -> list[str]:
        """All allowed values."""
        table: Mapping[str, Any] = getattr(importlib.import_module(self.module), self.table)
        return list(table)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: str) -> str:
        if value != self.usual and value not in self.names():
            raise ValueError(f"expected one of {', '.join(self.names())}")
        return value
