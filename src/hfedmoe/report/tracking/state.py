"""tracking.json in a run's folder: what each tracker has got, so that a resumed run goes on from there.

```
{"key": "0f3c...", "trackers": {"mlflow": {"sent": 5, "gains": false, "status": null, "store": "sqlite:///..."}}}
```
"""

import json
import secrets
import threading
from pathlib import Path
from typing import Any

from hfedmoe.errors import UserError
from hfedmoe.files.disk import replacing

NAME = "tracking.json"


class State:
    """What was sent; without a folder only in memory. Threads may use it together.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / NAME
        self._lock = threading.Lock()
        self._tree: dict[str, Any] = {"key": secrets.token_hex(8), "trackers": {}}
        if self._path is not None and self._path.exists():
            try:
                tree = json.loads(self._path.read_text(encoding="utf-8"))
                self._tree = {"key": str(tree["key"]), "trackers": dict(tree["trackers"])}
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{self._path}: is damaged ({error}); restore it, or delete it, and trackers get a new run"
                ) from None

    @property
    def key(self) -> str:
        """By which a tracker finds the run again."""
        return str(self._tree["key"])

    def of(self, tracker: str) -> dict[str, Any]:
        """What a tracker has: `sent`, the last round (-1: none); `gains`; `status` at its end; `store`."""
        with self._lock:
            return {"sent": -1, "gains": False, "status": None, "store": None} | self._tree["trackers"].get(tracker, {})

    def note(self, tracker: str, **changes: Any) -> None:
        """Change entries of a tracker and write the file. Raises OSError."""
        with self._lock:
            self._tree["trackers"].setdefault(tracker, {}).update(changes)
            if self._path is not None:
                with replacing(self._path) as file:
                    file.write(json.dumps(self._tree, indent=1).encode() + b"\n")

    def close(self) -> None:
        """Write no more: the folder may be another process's from now on."""
        with self._lock:
            self._path = None
