"""JSON that another machine sent."""

import json
from typing import Any


def received(text: str | bytes) -> Any:
    """The tree in a JSON text. Raises ValueError if it is not valid, or nested so deep that Python cannot read it."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
