"""Keys of devices, and how a request shows who sends it."""

import datetime
import subprocess
from pathlib import Path

import pytest
from flwr.common.constant import TIMESTAMP_HEADER

from hfedmoe.errors import UserError
from hfedmoe.fleet.keys import as_flower_has_it, new_key, private_key, public_line, public_of, sender, signed


def test_a_new_key_has_the_public_half_that_ssh_keygen_reads_from_it(tmp_path: Path) -> None:
    text = new_key()
    file = tmp_path / "key"
    file.write_text(text)
    file.chmod(0o600)
    try:
        said = subprocess.run(["ssh-keygen", "-y", "-f", str(file)], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("ssh-keygen is not installed")
    assert said.split()[:2] == public_of(private_key(text, "test")).split()[:2]


def test_a_request_names_its_sender_only_if_the_sender_signed_it_now() -> None:
    key, stranger = (private_key(new_key(), "test") for _ in range(2))
    headers = signed(key)
    assert sender(headers) == as_flower_has_it(public_of(key))
    assert sender({**headers, **{k: v for k, v in signed(stranger).items() if "public" in k}}) is None
    assert sender({name: value for name, value in headers.items() if name != TIMESTAMP_HEADER}) is None
    tomorrow = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
    assert sender({**headers, TIMESTAMP_HEADER: tomorrow.isoformat()}) is None
    assert sender(dict.fromkeys(headers, "not base64")) is None
    assert sender({}) is None


@pytest.mark.parametrize("text", ["", "ssh-rsa AAAA", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ3", "-----BEGIN"])
def test_what_is_no_key_is_refused_by_the_name_of_its_file(text: str) -> None:
    with pytest.raises(UserError, match=r"mine.pub: not a public key of `ssh-keygen -t ecdsa"):
        public_line(text, "mine.pub")
    with pytest.raises(UserError, match=r"mine: not a key of `ssh-keygen -t ecdsa"):
        private_key(text, "mine")
