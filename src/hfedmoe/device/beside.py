"""Memory that a device needs beside the process that trains: `hfedmoe join`, and the SuperNode that carries messages.

A budget is what a device gives in all, so these count. They are in the machine's memory, so a budget in a card's
memory has nothing beside it.
"""

JOIN_BYTES = 56 << 20
"""`hfedmoe join`: it starts the other two and looks after them."""
SUPERNODE_BYTES = 120 << 20
"""Flower's SuperNode with small messages. Large ones are in its memory too: once down, once up.

Measured on Linux as proportional set sizes, with `python -m benchmarks.device_memory`."""


def beside(device: str, bytes_down: int = 0, bytes_up: int = 0) -> int:
    """Bytes of the other processes.

    Args:
        device: where the model is ("cpu", "cuda", "mps"), and so the memory that the budget is about.
        bytes_down, bytes_up: of the messages of a round.
    """
    return 0 if device == "cuda" else JOIN_BYTES + SUPERNODE_BYTES + bytes_down + bytes_up


def left_of(memory_bytes: int, device: str) -> int:
    """Bytes of a budget that are for the process that trains, with small messages; of a tiny budget at least half."""
    return max(memory_bytes - beside(device), memory_bytes // 2)
