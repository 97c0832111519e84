"""The key of a device: how it is written, and how a request shows that its sender has it.

A request is signed as Flower's SuperNode signs its own: the public key, a time, and the signature of the time.
"""

import base64
import binascii
import datetime
import functools
from collections.abc import Mapping

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import (
    bytes_to_public_key,
    public_key_to_bytes,
    sign_message,
    uses_nist_ec_curve,
    verify_signature,
)

from hfedmoe.errors import UserError


def new_key() -> str:
    """A new private key on P-384, in OpenSSH's format: the only one that a SuperNode reads."""
    key = ec.generate_private_key(ec.SECP384R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode("ascii")


def private_key(text: str, origin: str) -> ec.EllipticCurvePrivateKey:
    """The private key in a text. Raises UserError, which names `origin`, if it is none."""
    try:
        key = load_ssh_private_key(text.encode(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UserError(f"{origin}: not a key of `ssh-keygen -t ecdsa -b 384` without a passphrase")
    return key


def public_of(key: ec.EllipticCurvePrivateKey) -> str:
    """The public half of a key as one line, as in a file of ssh-keygen."""
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode("ascii")


def public_line(text: str, origin: str) -> str:
    """A public key as one line without a comment. Raises UserError, which names `origin`, if it is none."""
    try:
        key = load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not uses_nist_ec_curve(key):
        raise UserError(f"{origin}: not a public key of `ssh-keygen -t ecdsa -b 384`")
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode("ascii")


@functools.lru_cache(maxsize=1 << 20)
def as_flower_has_it(line: str) -> bytes:
    """A public key as Flower stores it. It is remembered: a roster is read again whenever a device is invited."""
    key = load_ssh_public_key(line.encode())
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return public_key_to_bytes(key)


def signed(key: ec.EllipticCurvePrivateKey) -> dict[str, str]:
    """Headers that show who sends a request, valid for a short time."""
    now = datetime.datetime.now(datetime.UTC).isoformat()
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(public_key_to_bytes(key.public_key())).decode("ascii"),
        TIMESTAMP_HEADER: now,
        FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(sign_message(key, now.encode("ascii"))).decode("ascii"),
    }


def sender(headers: Mapping[str, str]) -> bytes | None:
    """The public key, as Flower stores it, whose owner signed these headers a short time ago; None: nobody did."""
    try:
        key = base64.b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
        signature = base64.b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
        stamp = headers[TIMESTAMP_HEADER]
        age = (datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(stamp)).total_seconds()
        fresh = -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
        if fresh and verify_signature(bytes_to_public_key(key), stamp.encode("ascii"), signature):
            return key
    except (KeyError, ValueError, TypeError, UnicodeError, AttributeError, binascii.Error, UnsupportedAlgorithm):
        return None
    return None
