"""Python's `resource` module, or None on Windows, which has none. Imports nothing that takes memory."""

from typing import Any

resource: Any
try:
    import resource
except ImportError:  # Windows
    resource = None
