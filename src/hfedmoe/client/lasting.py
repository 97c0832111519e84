"""What a device remembers of a run for good, also when one of its rounds begins again.

These are records in Flower's state, beside the client's history. A server that goes on from a checkpoint takes a
device back to the state before a round (`fleet.memory`), but not these: else it could so ask again for what is done
once in a run.
"""

from collections.abc import MutableMapping
from typing import Any

PREFIX = "lasting/"
"""The names of such records begin with it."""
MEASURED, TUNED = f"{PREFIX}measured", f"{PREFIX}tuned"
"""What it answered after the last round (`client.once`)."""


def restore(state: MutableMapping[str, Any], now: MutableMapping[str, Any]) -> None:
    """Put the lasting records of the state of now into an earlier one, in place of those that it had."""
    for name in [name for name in state if name.startswith(PREFIX)]:
        del state[name]
    for name, record in now.items():
        if name.startswith(PREFIX):
            state[name] = record
