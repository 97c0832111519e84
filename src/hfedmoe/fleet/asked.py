"""How many different tasks servers have asked a device about, until its owner stops it.

Which columns hold texts and labels, which labels there are and how a row is read are settings of a run. Whether a
device fits says one bit about its rows under them, whatever the answer is; so a server that could ask without end could
learn who is among the rows. A run has one task (`deployment`), but a server may begin many runs.
"""

import json
from pathlib import Path

from hfedmoe.client.policy import PolicyError
from hfedmoe.errors import UserError
from hfedmoe.files.disk import disk_errors, replacing
from hfedmoe.wire.trouble import MANY_TASKS

MOST = 8
"""Different tasks that are answered. A federation has one, and some more while its settings are put right."""


class Asked:
    """The tasks that servers asked about, in a file, as their keys (`data.terms.task_key`)."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def note(self, key: str) -> None:
        """Note that a server asks about a task, before any row is read for it.

        Raises:
            PolicyError: it is one too many.
            DiskError: the disk is full.
            UserError: the file is damaged.
        """
        known = self._known()
        if key in known:
            return
        if len(known) >= MOST:
            raise PolicyError(
                f"servers have asked this device about {MOST} different tasks (columns, labels, how rows are read), "
                f"and each answer says something about its rows: delete {self._path} and start it again to answer more",
                MANY_TASKS,
            )
        with disk_errors(self._path, "start the device again"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as stream:
                stream.write(json.dumps([*known, key]).encode())

    def _known(self) -> list[str]:
        try:
            known = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise UserError(f"{self._path}: cannot be read ({error}); delete it and start the device again") from None
        if not isinstance(known, list):
            raise UserError(f"{self._path}: is damaged; delete it and start the device again")
        return known
