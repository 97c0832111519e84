"""What a device lets the server's configuration do to it."""

import sys
from types import SimpleNamespace

import pytest
from flwr.app import Context, Message, Metadata, RecordDict

from hfedmoe import deployment as apps
from hfedmoe.client.device import Device
from hfedmoe.data.known.labelled import R8
from hfedmoe.data.terms import Terms
from hfedmoe.errors import UserError
from hfedmoe.wire.messages import DESCRIBE, describe_request

CODE = '[model]\nname = "tiny"\ntrust_remote_code = true\n[clients]\ncount = 1\n'


def context(**node: bool | float | str) -> Context:
    return Context(
        run_id=7,
        node_id=1,
        node_config={"partition-id": 0, **node},
        state=RecordDict(),
        run_config={"config": CODE},
    )


def opened(context: Context) -> Device:
    """The device as it is opened when the server asks who it is."""
    terms = Terms("reuters-r8", "classification", R8, True)
    metadata = Metadata(1, "1", 0, 1, "", "", 0.0, 60.0, DESCRIBE)
    message = Message(describe_request(terms.to_json()), metadata=metadata)  # type: ignore[call-overload]
    return apps.open_device(message, context)


@pytest.mark.parametrize(
    "said", [{}, {"num-partitions": 2}, {"trust-remote-code": False}, {"trust-remote-code": "yes"}]
)
def test_only_the_node_itself_allows_code_of_a_checkpoint(said: dict[str, bool | str]) -> None:
    with pytest.raises(UserError, match=r"code that is shipped with tiny .*--node-config \"... trust-remote-code=true"):
        opened(context(**said))


def test_in_a_simulation_the_runs_own_setting_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    assert opened(context(**{"num-partitions": 1})).config.model.trust_remote_code


def test_a_node_that_allows_it_takes_part_and_its_note_is_of_this_run() -> None:
    device = opened(context(**{"trust-remote-code": True}))
    assert device.config.model.trust_remote_code
    assert device.notes is not None
    assert device.notes.name == "7-client-0.json"
    assert device.tuned is not None
    assert device.tuned.name == "7-client-0.safetensors"
