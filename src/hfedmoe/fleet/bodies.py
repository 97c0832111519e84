"""What a device may send in one call: no more than any call needs, and answers of its own only.

Flower checks that the node that a call names belongs to the key that signed it. It does not check that an answer is
of this node, so one device could answer for another.
"""

from collections.abc import AsyncIterator

from flwr.proto.fleet_pb2 import PushMessagesRequest
from google.protobuf.message import DecodeError
from starlette.requests import Request

from hfedmoe.wire.messages import MAX_FACTS

MOST_BYTES = MAX_FACTS + (1 << 20)
"""Of a call. Flower sends tensors in pieces of 5 MiB, but the facts of a message in one."""


class TooLargeError(Exception):
    """A call has more than `MOST_BYTES`."""


class NotItsOwnError(Exception):
    """A device sends what is no answer of its own."""


async def body(request: Request) -> AsyncIterator[bytes]:
    """The body of a call, piece by piece. Raises TooLargeError as soon as it is too large."""
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > MOST_BYTES:
            raise TooLargeError
        yield piece


def declared(request: Request) -> None:
    """Raise TooLargeError if a call says itself that it is too large."""
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > MOST_BYTES:
        raise TooLargeError


async def own_answers(request: Request) -> bytes:
    """The body of a call that brings answers. Raises NotItsOwnError if one is not of the node that calls."""
    content = b"".join([piece async for piece in body(request)])
    try:
        call = PushMessagesRequest.FromString(content)
    except DecodeError:
        raise NotItsOwnError from None
    if any(message.metadata.src_node_id != call.node.node_id for message in call.messages_list):
        raise NotItsOwnError
    return content
