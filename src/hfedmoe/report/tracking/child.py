"""The process that talks to one tracker's library: `python -m hfedmoe.report.tracking.child NAME`.

It reads a line of JSON from its input, and answers each with one: {"ok": ...} or {"error": "..."}. When its input ends,
also because the run was killed, it closes the tracker's run. All that libraries print goes to the error output.
"""

import importlib
import json
import os
import re
import signal
import sys
import traceback
from typing import Any, Protocol

from hfedmoe.report.tracking.figures import Figures
from hfedmoe.report.tracking.start import STOPPED, Start, Status

SECRET = re.compile(r"KEY|TOKEN|PASSWORD|SECRET")
LONGEST = 300
"""Characters of an error."""


class Tracker(Protocol):
    """A run that is open in a tracker. Every method may raise what the library raises."""

    place: str
    """Where people find it."""
    last: int | None
    """The last round that it has, where the library can tell."""
    store: str | None
    """Where it writes, if the run must be continued with the same."""

    def log(self, round: int, figures: Figures) -> None:
        """Add the figures of a round."""

    def gains(self, round: int, figures: Figures) -> None:
        """Add what the sites gained, known after the last round."""

    def close(self, status: Status) -> None:
        """Write all that is left, and mark the run as finished, stopped or failed."""


def main(name: str) -> None:
    """Serve until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which then closes its trackers
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    served = _Served(name)
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"ok": served.do(json.loads(line))}
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            answer = {"error": clean(f"{type(error).__name__}: {error}")}
        try:
            print(json.dumps(answer), file=answers, flush=True)
        except BrokenPipeError:
            break
    served.end()


class _Served:
    def __init__(self, name: str) -> None:
        self._open = importlib.import_module(f"hfedmoe.report.tracking.trackers.{name}").open_run
        self._tracker: Tracker | None = None

    def do(self, message: dict[str, Any]) -> dict[str, Any]:
        if message["do"] == "open":
            self._tracker = tracker = self._open(Start(**message["start"]))
            return {"place": clean(tracker.place), "last": tracker.last, "store": tracker.store}
        assert self._tracker is not None
        if message["do"] == "log":
            self._tracker.log(message["round"], message["figures"])
        elif message["do"] == "gains":
            self._tracker.gains(message["round"], message["figures"])
        else:
            closing, self._tracker = self._tracker, None
            closing.close(message["status"])
        return {}

    def end(self) -> None:
        if self._tracker is not None:
            self._tracker.close(STOPPED)


def clean(text: str) -> str:
    """One short line without passwords and keys: they may be in addresses and in what libraries say."""
    text = re.sub(r"//[^/@\s]+@", "//***@", " ".join(text.split()))
    for name, value in os.environ.items():
        if SECRET.search(name.upper()) and len(value) >= 8:
            text = text.replace(value, "***")
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


if __name__ == "__main__":
    main(sys.argv[1])
