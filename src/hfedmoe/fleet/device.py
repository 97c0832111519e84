"""The folder of a device: its log files, its key for Flower, what it remembers of its runs, and its own experts."""

from dataclasses import dataclass
from pathlib import Path

DOES_NOT_FIT, AGAIN = 3, 4
"""The worker's exit codes after a check that failed; AGAIN: only because the server did not answer."""


@dataclass(frozen=True)
class DeviceFolder:
    """The files of a device that has joined."""

    path: Path

    @property
    def settings(self) -> Path:
        """What its owner allows, for its worker."""
        return self.path / "join.json"

    @property
    def key(self) -> Path:
        """Its private key, as Flower reads it."""
        return self.path / "key"

    @property
    def ca(self) -> Path:
        """The certificate of the server's authority."""
        return self.path / "ca.crt"

    @property
    def secret(self) -> Path:
        """With it the worker shows the SuperNode that it belongs to it."""
        return self.path / "worker.secret"

    @property
    def ready(self) -> Path:
        """There while the worker is ready for messages."""
        return self.path / "ready"

    @property
    def asked(self) -> Path:
        """Which tasks servers asked about (`fleet.asked`)."""
        return self.path / "asked.json"

    @property
    def memory(self) -> Path:
        """What it remembers of its runs."""
        return self.path / "memory"

    @property
    def tuned(self) -> Path:
        """The folder of what it trained for itself after the last rounds of its runs, a file of each."""
        return self.path / "tuned"

    @property
    def log(self) -> Path:
        """What is shown, with times."""
        return self.path / "join.log"

    @property
    def node_log(self) -> Path:
        """Of Flower's SuperNode."""
        return self.path / "supernode.log"
