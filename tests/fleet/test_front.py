"""What is reachable from outside."""

import asyncio
import contextlib
import ssl
from pathlib import Path

import httpx
import pytest
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata
from flwr.proto.node_pb2 import Node
from starlette.requests import Request

from hfedmoe.fleet.bodies import MOST_BYTES, TooLargeError, body
from hfedmoe.fleet.folder import opened
from hfedmoe.fleet.front import CALLS, Board, front
from hfedmoe.fleet.invite import key_of, read_invitation
from hfedmoe.fleet.keys import new_key, private_key, signed
from hfedmoe.fleet.offer import PATH
from tests.fleet.places import HOST, new_fleet


@pytest.fixture
def port(tmp_path: Path) -> int:
    return new_fleet(tmp_path, "north")


def client(tmp_path: Path) -> httpx.Client:
    trust = ssl.create_default_context(cafile=tmp_path / "fleet" / "ca.crt")
    return httpx.Client(verify=trust, timeout=30, trust_env=False)


def test_only_the_calls_of_devices_pass_and_only_with_a_key_on_the_roster(tmp_path: Path, port: int) -> None:
    known = key_of(read_invitation(tmp_path / "north.invite"), None)
    stranger = private_key(new_key(), "test")
    with front(Board(opened(tmp_path / "fleet")), HOST, port), client(tmp_path) as http:
        address = f"https://{HOST}:{port}"
        for call in CALLS:
            assert http.post(f"{address}/v1/fleet/{call}").status_code == 401
            assert http.post(f"{address}/v1/fleet/{call}", headers=signed(stranger)).status_code == 401
            # Nothing is behind the front yet, so who is known is asked to come again.
            assert http.post(f"{address}/v1/fleet/{call}", headers=signed(known)).status_code == 503
            assert http.get(f"{address}/v1/fleet/{call}", headers=signed(known)).status_code == 405
        for path in (
            "/v1/control/start-run",
            "/v1/control/register-node",
            "/v1/runtime/acquire-task",
            "/v1/fleet/register-node",
            "/v1/fleet/../control/start-run",
            "/v1/fleet/%2e%2e/control/start-run",
            "/v1/fleet/get-run/../../control/start-run",
            "/docs",
            "/",
        ):
            assert http.post(f"{address}{path}", headers=signed(known)).status_code == 404, path
        assert http.get(f"{address}{PATH}").status_code == 401
        assert http.get(f"{address}{PATH}", headers=signed(known)).status_code == 503


def test_without_tls_nothing_is_said(tmp_path: Path, port: int) -> None:
    with front(Board(opened(tmp_path / "fleet")), HOST, port), pytest.raises(httpx.TransportError):
        httpx.get(f"http://{HOST}:{port}{PATH}", trust_env=False)


def test_a_call_that_is_too_large_is_refused(tmp_path: Path, port: int) -> None:
    known = key_of(read_invitation(tmp_path / "north.invite"), None)
    pieces = [bytes(1 << 20)] * (MOST_BYTES // (1 << 20) + 2)

    with front(Board(opened(tmp_path / "fleet")), HOST, port), client(tmp_path) as http:
        address = f"https://{HOST}:{port}/v1/fleet"
        for size, status in ((MOST_BYTES, 503), (MOST_BYTES + 1, 413)):
            headers = signed(known) | {"content-length": str(size)}
            assert http.post(f"{address}/push-object", headers=headers, content=bytes(size)).status_code == status
        # Without a length; it may still be sending when the front hangs up.
        with contextlib.suppress(httpx.TransportError):
            answer = http.post(f"{address}/push-messages", headers=signed(known), content=iter(pieces))
            assert answer.status_code == 413


def test_of_a_call_no_more_is_read_than_may_be() -> None:
    given = []

    async def receive() -> dict[str, object]:
        given.append(1 << 20)
        return {"type": "http.request", "body": bytes(1 << 20), "more_body": True}

    async def read() -> int:
        return sum([len(piece) async for piece in body(Request({"type": "http"}, receive))])

    with pytest.raises(TooLargeError):
        asyncio.run(read())
    assert sum(given) == MOST_BYTES + (1 << 20)


def test_a_device_answers_for_itself_only(tmp_path: Path, port: int) -> None:
    known = key_of(read_invitation(tmp_path / "north.invite"), None)

    def call(*nodes: int) -> bytes:
        answers = [Message(metadata=Metadata(src_node_id=node)) for node in nodes]
        return PushMessagesRequest(node=Node(node_id=7), messages_list=answers).SerializeToString()

    with front(Board(opened(tmp_path / "fleet")), HOST, port), client(tmp_path) as http:
        for content, status in ((call(7), 503), (call(8), 403), (call(7, 8), 403), (b"no answer", 403)):
            answer = http.post(f"https://{HOST}:{port}/v1/fleet/push-messages", headers=signed(known), content=content)
            assert answer.status_code == status
