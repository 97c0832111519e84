"""Updates of clients, worked out by hand."""

from torch import Tensor

from hfedmoe.events import Work
from hfedmoe.wire.messages import Update


def update_of(
    tensors: dict[str, Tensor],
    trained: list[Tensor],
    usage: list[Tensor],
    importance: list[Tensor],
    tokens: list[Tensor],
    examples: int = 1,
    sent: list[Tensor] | None = None,
) -> Update:
    """Of a client that sends what it trained, or `sent`."""
    return Update(tensors, sent or trained, trained, usage, importance, tokens, Work(examples=examples))
