"""An invitation: one small file that a device needs to take part."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from hfedmoe.errors import UserError
from hfedmoe.files.received import received
from hfedmoe.fleet.folder import Folder, changing
from hfedmoe.fleet.keys import new_key, private_key, public_line, public_of
from hfedmoe.fleet.secret import write_secret

FORMAT = 1


@dataclass(frozen=True)
class Invitation:
    """What a device needs to find its server, to know it, and to be known."""

    name: str
    number: int
    host: str
    port: int
    ca: str
    """The fleet's certificate authority, PEM."""
    key: str | None
    """The device's private key, OpenSSH; None: the device made its own, and the server has only the public half."""

    @property
    def address(self) -> str:
        """As Flower takes it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def invite(folder: Folder, name: str, out: Path, max_examples: int | None = None, key: Path | None = None) -> Path:
    """Write an invitation (mode 0600) and put the device on the roster.

    Args:
        out: the folder for it.
        max_examples: most rows that the device may count for.
        key: the public key that the device made itself; None: a pair is made here, and only the invitation keeps the
            private half.

    Raises:
        UserError: the name is in use, or the file exists or cannot be written.
    """
    host, port = folder.address()
    private = None
    if key is None:
        private = new_key()
        public = public_of(private_key(private, name))
    else:
        public = public_line(_read(key), str(key))
    path = out / f"{name}.invite"
    with changing(folder) as roster:
        changed = roster.with_device(name, public, max_examples)
        number = next(device.number for device in changed.devices if device.name == name)
        ca = _read(folder.ca)
        content = asdict(Invitation(name, number, host, port, ca, private)) | {"format": FORMAT}
        write_secret(path, (json.dumps(content, indent=1) + "\n").encode())
        try:
            changed.write(folder.roster)
        except BaseException:
            path.unlink()  # an invitation of a device that is not on the roster is of no use
            raise
    return path


def read_invitation(path: Path) -> Invitation:
    """The invitation in a file. Raises UserError if it is missing or damaged."""
    try:
        content = received(_read(path))
        if content.pop("format") != FORMAT:
            raise UserError(f"{path}: of another version of hfedmoe; ask for a new one")
        found = Invitation(**content)
        texts = (found.name, found.host, found.ca, "" if found.key is None else found.key)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError
        if not (isinstance(found.number, int) and isinstance(found.port, int)):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not an invitation, or damaged; ask for it again") from None
    return found


def key_of(invitation: Invitation, own: Path | None) -> ec.EllipticCurvePrivateKey:
    """The private key of an invited device: from its invitation, or from its own file. Raises UserError."""
    if own is not None:
        return private_key(_read(own), str(own))
    if invitation.key is None:
        raise UserError(f"the invitation of {invitation.name} is for a key of its own; give it with --key FILE")
    return private_key(invitation.key, f"the invitation of {invitation.name}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file") from None
