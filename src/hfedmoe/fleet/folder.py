"""The folder of a fleet on its server: certificates, keys, roster, Flower's database, logs."""

import contextlib
import ipaddress
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hfedmoe.errors import UserError
from hfedmoe.files.disk import disk_errors, replacing
from hfedmoe.files.locks import HeldError, claim
from hfedmoe.fleet.certificates import make_certificates
from hfedmoe.fleet.roster import Roster
from hfedmoe.fleet.secret import write_secret

AGAIN = "give the command again"
HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")


@dataclass(frozen=True)
class Folder:
    """The files of a fleet."""

    path: Path

    @property
    def settings(self) -> Path:
        """Name and port of the server."""
        return self.path / "fleet.json"

    @property
    def roster(self) -> Path:
        """Who may take part."""
        return self.path / "roster.json"

    @property
    def ca(self) -> Path:
        """The certificate that devices get."""
        return self.path / "ca.crt"

    @property
    def certificate(self) -> Path:
        """The server's."""
        return self.path / "server.crt"

    @property
    def key(self) -> Path:
        """The server's private key."""
        return self.path / "server.key"

    @property
    def database(self) -> Path:
        """Flower's."""
        return self.path / "flower.db"

    @property
    def serving(self) -> Path:
        """What is served now: written by `serve`, read by the front, `status` and `stop`; removed at the end."""
        return self.path / "serving.json"

    @property
    def logs(self) -> Path:
        """The folder of the log files."""
        return self.path / "logs"

    def address(self) -> tuple[str, int]:
        """The name and port under which devices reach the server. Raises UserError if the file is damaged."""
        try:
            content = json.loads(self.settings.read_text(encoding="utf-8"))
            return str(content["name"]), int(content["port"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{self.settings}: not the settings of a fleet") from None


def create(path: Path, name: str, port: int) -> Folder:
    """Make the folder of a new fleet. Raises UserError if there is one, or the name is no host name or IP address."""
    if not (HOST.fullmatch(name) or _is_ip_address(name)):
        raise UserError(f"{name!r}: give the name or the IP address under which devices reach this server")
    folder = Folder(path)
    if folder.settings.exists():
        raise UserError(f"{path}: has a fleet already; give another --fleet, or remove this folder to begin anew")
    made = make_certificates(name)
    with disk_errors(path, AGAIN):
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o700)
    write_secret(path / "ca.key", made.ca_key)
    write_secret(folder.key, made.server_key)
    write_secret(folder.certificate, made.server)
    write_secret(folder.ca, made.ca)
    Roster().write(folder.roster)
    with disk_errors(path, AGAIN):
        folder.logs.mkdir(exist_ok=True)
    with disk_errors(path, AGAIN), replacing(folder.settings) as stream:  # last: with it, the folder is complete
        stream.write((json.dumps({"name": name, "port": port}) + "\n").encode())
    return folder


def _is_ip_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def opened(path: Path) -> Folder:
    """The folder of a fleet. Raises UserError if there is none."""
    folder = Folder(path)
    if not folder.settings.is_file():
        raise UserError(f"{path}: no fleet here; `hfedmoe serve init HOST --fleet {path}` makes one")
    return folder


@contextlib.contextmanager
def changing(folder: Folder) -> Iterator[Roster]:
    """The roster, while nobody else changes it. Raises UserError if another command does so now, or DiskError."""
    with disk_errors(folder.path, AGAIN):
        lock = (folder.path / "roster.lock").open("w")
    with lock:
        try:
            claim(lock.fileno())
        except HeldError:
            raise UserError(f"{folder.roster}: another command is changing it; try again") from None
        yield Roster.read(folder.roster)
