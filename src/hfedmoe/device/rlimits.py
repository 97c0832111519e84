"""Resource limits of a process, where the system has them (not on Windows). Imports nothing that takes memory."""

from typing import Any

resource: Any
try:
    import resource
except ImportError:  # Windows
    resource = None
