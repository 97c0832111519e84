"""Who may take part: name, number, public key and the greatest number of rows of every invited device.

What a device says about its number or its name is ignored: the roster decides, by the key.
"""

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hfedmoe.errors import UserError
from hfedmoe.files.disk import disk_errors, replacing
from hfedmoe.fleet.keys import as_flower_has_it

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
FORMAT = 1


@dataclass(frozen=True)
class Invited:
    """One device."""

    name: str
    number: int
    """Of the client, from 0."""
    key: str
    """Its public key, as a line of OpenSSH."""
    max_examples: int | None = None
    """Most rows that it counts for; None: `federation.max_weight` alone limits it."""


@dataclass(frozen=True)
class Roster:
    """The devices of a fleet, in the order of their numbers."""

    devices: tuple[Invited, ...] = ()
    ended: tuple[str, ...] = ()
    """Keys of devices that were removed: Flower takes a key only once."""

    @classmethod
    def read(cls, path: Path) -> "Roster":
        """The roster in a file. Raises UserError if it is damaged."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise UserError(f"{path}: of another version of hfedmoe (format {content['format']})")
            return cls(tuple(Invited(**device) for device in content["devices"]), tuple(content["ended"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a roster ({error})") from None

    def write(self, path: Path) -> None:
        """Write it whole or not at all. Raises DiskError."""
        content = {"format": FORMAT, "devices": [asdict(device) for device in self.devices], "ended": self.ended}
        with disk_errors(path, "give the command again"), replacing(path) as stream:
            stream.write((json.dumps(content, indent=1) + "\n").encode())

    @property
    def count(self) -> int:
        """The number of clients that a run must have room for: one more than the greatest number."""
        return 1 + max((device.number for device in self.devices), default=-1)

    def with_device(self, name: str, key: str, max_examples: int | None) -> "Roster":
        """The roster with a new device, with the lowest free number. Raises UserError if name or key is in use."""
        if not NAME.fullmatch(name):
            raise UserError(f"{name!r}: a name is up to 40 letters, digits and . _ -, the first a letter or digit")
        for device in self.devices:
            if device.name == name:
                raise UserError(f"{name} is invited already; `hfedmoe remove {name}` first ends its earlier invitation")
            if device.key == key:
                raise UserError(f"this key is {device.name}'s; every device needs a key of its own")
        if key in self.ended:
            raise UserError("this key was removed from the fleet; the device must make a new one")
        taken = {device.number for device in self.devices}
        number = next(n for n in range(len(taken) + 1) if n not in taken)
        devices = (*self.devices, Invited(name, number, key, max_examples))
        return replace(self, devices=tuple(sorted(devices, key=lambda device: device.number)))

    def without(self, name: str) -> "Roster":
        """The roster without a device. Raises UserError if there is none of this name."""
        if all(device.name != name for device in self.devices):
            names = ", ".join(device.name for device in self.devices) or "nobody"
            raise UserError(f"{name} is not invited; invited: {names}")
        stay = tuple(device for device in self.devices if device.name != name)
        gone = tuple(device.key for device in self.devices if device.name == name)
        return replace(self, devices=stay, ended=(*self.ended, *gone))

    def by_key(self) -> dict[bytes, Invited]:
        """The devices by their public keys as Flower stores them."""
        return {as_flower_has_it(device.key): device for device in self.devices}
