"""trackio. It writes to SQLite on this machine, or where its own variables say, such as TRACKIO_SPACE_ID."""

import os
import warnings
from typing import Any

from hfedmoe.report.tracking.figures import Figures
from hfedmoe.report.tracking.start import Start, Status

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import trackio

ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
KEY = 6
"""Characters of the key in the run's name: trackio finds a run by its name, and runs may have the same folder name."""


class TrackioError(RuntimeError):
    """What trackio only warns of, such as figures that it could not write."""


class Run:
    """A run of trackio, found again by its name."""

    store: str | None = None

    def __init__(self, start: Start) -> None:
        self._warnings: list[str] = []
        warnings.showwarning = self._warned  # type: ignore[assignment]  # takes more, and ignores it
        name = f"{start.name}-{start.key[:KEY]}"
        self._run = trackio.init(
            project=start.project,
            name=name,
            group=start.group,
            config=start.config | ({"tags": ", ".join(start.tags)} if start.tags else {}),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self._check()
        # What trackio reads itself, for runs that log without steps; on a server it may not know.
        self.last: int | None = getattr(self._run, "_initial_last_step", None)
        if self.last is None and not any(os.environ.get(name) for name in ELSEWHERE):
            self.last = -1
        self.place = f"project {start.project}, run {name}"

    def log(self, round: int, figures: Figures) -> None:
        """As `child.Tracker`."""
        self._run.log(figures, step=round)
        self._check()

    gains = log

    def close(self, status: Status) -> None:
        """As `child.Tracker`."""
        trackio.finish()
        self._check()

    def _warned(self, message: Warning | str, category: type[Warning], *_: Any) -> None:
        if not issubclass(category, DeprecationWarning | FutureWarning):
            self._warnings.append(str(message))

    def _check(self) -> None:
        """Raise what it warned of since the last call; it writes in a thread, so that may be about earlier rounds."""
        if self._warnings:
            text = "; ".join(self._warnings)
            self._warnings.clear()
            raise TrackioError(text)


def open_run(start: Start) -> Run:
    """Begin or go on."""
    return Run(start)
