"""A client's word that it could not do its part of a round: it ran out of memory or time, or has too little room."""

from dataclasses import dataclass

OUT_OF_MEMORY, OUT_OF_TIME, TOO_SMALL = "out_of_memory", "out_of_time", "too_small"
STATUSES = (OUT_OF_MEMORY, OUT_OF_TIME, TOO_SMALL)
"""The status in such a reply; people read it without the underscores. TOO_SMALL: no room for what the method holds."""


@dataclass(frozen=True)
class Trouble:
    """Why a client has no update: `status` is one of the above, `reason` one line."""

    status: str
    reason: str
