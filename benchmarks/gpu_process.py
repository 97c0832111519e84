"""Run a measurement in a process of its own, with a time limit; what it printed until then is kept."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def rows_of(
    module: str, arguments: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None
) -> tuple[list[dict[str, Any]], str | None]:
    """The JSON objects that `python -m MODULE ARGUMENTS` prints, one per line, and why it failed (None: it did not)."""
    done, failure = None, None
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})},
        )
        printed = done.stdout
        if done.returncode != 0:
            failure = f"exit status {done.returncode}: {done.stderr[-3000:]}"
    except subprocess.TimeoutExpired as late:
        printed = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        failure = f"stopped after {seconds:.0f} s"
    # A library may print lines of its own, and a stopped process may leave half a line.
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith('{"') and line.endswith("}")]
    return rows, failure
