"""The process of one tracker, as the run sees it: every question has an answer in time, or an error."""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

LOG = "tracking.log"
"""In a run's folder: all that trackers print."""


class TrackerError(Exception):
    """A tracker failed; the text is one line that says how."""


class TrackerProcess:
    """A started `child`.

    Args:
        log: file to which its output is added; None: nowhere.
        timeout_s: seconds that an answer may take.
    """

    def __init__(self, name: str, log: Path | None, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        command = [sys.executable, "-m", "hfedmoe.report.tracking.child", name]
        output = Path(os.devnull) if log is None else log
        with output.open("ab") as stream:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # so that Ctrl-C does not end it, and all that it starts ends with it
            )

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Its answer. Raises TrackerError if it reports an error, ends, or takes too long; then call `kill`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self.kill()

        timer = threading.Timer(self._timeout_s, give_up)
        timer.daemon = True
        timer.start()
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except (OSError, ValueError):
            line = ""
        finally:
            timer.cancel()
        if not line:
            # ValueError, an empty line and a broken pipe all mean that it is gone.
            raise TrackerError(f"no answer in {self._timeout_s:g} s" if late.is_set() else "its process ended")
        answer = json.loads(line)
        if "error" in answer:
            raise TrackerError(answer["error"])
        done: dict[str, Any] = answer["ok"]
        return done

    def kill(self) -> None:
        """End it, with all that it started, at once."""
        if self._process.poll() is None:  # else its number may be another's by now
            with suppress(ProcessLookupError):
                if hasattr(os, "killpg"):
                    os.killpg(self._process.pid, signal.SIGKILL)
                else:
                    self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """Let it end by itself, but not for long: its tracker is closed already."""
        with suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(self._timeout_s)
        self.kill()
