"""Real TLS handshakes with the certificates of a new fleet."""

import contextlib
import socket
import ssl
import threading
from pathlib import Path

import pytest

from hfedmoe.fleet.certificates import make_certificates


def handshake(folder: Path, asked: str, trusted: bytes) -> None:
    """Connect to a server with the certificate in the folder, as a client that trusts `trusted` and asks for a name."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.crt", folder / "server.key")
    client = ssl.create_default_context(cadata=trusted.decode())
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    ours, theirs = socket.socketpair()

    def answer() -> None:
        with theirs, contextlib.suppress(ssl.SSLError, OSError):
            server.wrap_socket(theirs, server_side=True).close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with ours:
            client.wrap_socket(ours, server_hostname=asked).close()
    finally:
        thread.join()


@pytest.mark.parametrize("name", ["fl.example.org", "192.0.2.7", "127.0.0.1"])
def test_a_server_is_known_under_its_name_and_from_its_own_machine_and_under_no_other(
    name: str, tmp_path: Path
) -> None:
    made, other = make_certificates(name), make_certificates(name)
    (tmp_path / "server.crt").write_bytes(made.server)
    (tmp_path / "server.key").write_bytes(made.server_key)
    for asked in (name, "127.0.0.1"):
        handshake(tmp_path, asked, made.ca)
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(tmp_path, "other.example.org", made.ca)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path, name, other.ca)
