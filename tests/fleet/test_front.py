"""What is reachable from outside."""

import ssl
from pathlib import Path

import httpx
import pytest

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
