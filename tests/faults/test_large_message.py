"""A message of more than 2 GiB, which no single message of protobuf can hold: Flower sends it in pieces."""

import psutil
import pytest
import torch
from flwr.app import Message, Metadata
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from hfedmoe.wire.messages import TRAIN, record, tensors_of

SIZE = (1 << 31) + (1 << 27)


@pytest.mark.faults
def test_a_message_of_more_than_two_gibibytes_arrives() -> None:
    """The objects that a SuperLink stores, without the SuperLink: it handles each by itself."""
    if psutil.virtual_memory().available < 5 * SIZE:
        pytest.skip("needs 11 GiB of free memory")
    sent = torch.arange(SIZE // 8)
    metadata = Metadata(1, "", 0, 1, "", "", 0.0, 60.0, TRAIN)
    message = Message(record({"round": 1}, {"rows": sent}), metadata=metadata)  # type: ignore[call-overload]
    objects = get_all_nested_objects(message)
    contents = {name: one.deflate() for name, one in objects.items()}
    last = message.object_id
    del message, objects
    assert sum(map(len, contents.values())) > 1 << 31
    assert max(map(len, contents.values())) < 1 << 23
    assert all(get_object_id(content) == name for name, content in contents.items())
    arrived = inflate_object_from_contents(last, contents)
    assert isinstance(arrived, Message)
    assert torch.equal(tensors_of(arrived)["rows"], sent)
