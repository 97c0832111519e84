"""A client's word that it could not do its part of a round: it ran out of memory or time."""

from dataclasses import dataclass

OUT_OF_MEMORY, OUT_OF_TIME = "out_of_memory", "out_of_time"
"""The status in such a reply; people read it without the underscores."""


@dataclass(frozen=True)
class Trouble:
    """Why a client has no update: `status` is one of the above, `reason` one line."""

    status: str
    reason: str
