"""`hfedmoe status` and `hfedmoe stop`: what a server is doing, and how to end it."""

import json
import os
import signal
import time
from typing import Any

from hfedmoe.errors import UserError
from hfedmoe.files.disk import disk_errors
from hfedmoe.files.locks import HeldError, claim
from hfedmoe.fleet.folder import Folder
from hfedmoe.fleet.roster import Roster
from hfedmoe.report.table import table

HERE_S = 45.0
"""Seconds since its last call in which a device counts as here. A SuperNode calls every 3 s, or, while it works, with a
heartbeat about every 20 s."""


def serving(fleet: Folder) -> dict[str, Any] | None:
    """What the fleet's server notes (`fleet.notes`); None: nothing is served."""
    try:
        with disk_errors(fleet.path, "ask again"), (fleet.path / "serve.lock").open("ab") as lock:
            claim(lock.fileno())
        return None
    except HeldError:
        pass
    try:
        found: dict[str, Any] = json.loads(fleet.serving.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"doing": "starting", "run": "", "round": 0, "rounds": 0, "devices": {}, "pid": None}
    except ValueError as error:
        raise UserError(f"{fleet.serving}: is damaged ({error})") from None
    return found


def status(fleet: Folder) -> dict[str, Any]:
    """The run that is served, and every invited device."""
    found = serving(fleet)
    # What is noted is as old as the file, which is not always written at once.
    now = time.time() if found is None else found.get("at", time.time())
    known = {} if found is None else found["devices"]
    devices = []
    for device in Roster.read(fleet.roster).devices:
        noted = known.get(device.name, {})
        seen = noted.get("seen")
        devices.append(
            {
                "name": device.name,
                "number": device.number,
                "max_examples": device.max_examples,
                "here": seen is not None and now - seen < HERE_S,
                "seen_s": None if seen is None else round(now - seen),
                "budget": noted.get("budget"),
                "rows": noted.get("rows"),
                "versions": noted.get("versions", ""),
                "takes_part": noted.get("takes_part", ""),
                "left_out": noted.get("left_out", ""),
            }
        )
    run = None if found is None else {key: found[key] for key in ("run", "round", "rounds", "doing")}
    return {"serving": run, "devices": devices}


def as_text(found: dict[str, Any]) -> str:
    """For people."""
    run = found["serving"]
    if run is None:
        first = "nothing is served"
    elif run["rounds"]:
        first = f"{run['run']}: round {run['round']} of {run['rounds']}, {run['doing']}"
    else:
        first = f"{run['run']}: {run['doing']}"
    rows = []
    for device in found["devices"]:
        seen = "never" if device["seen_s"] is None else f"{device['seen_s']} s ago"
        cells = [str(device[key] or "-") for key in ("rows", "budget", "versions", "takes_part", "left_out")]
        rows.append([device["name"], "yes" if device["here"] else "no", seen, *cells])
    headings = ["device", "here", "last seen", "rows", "budget", "versions", "takes part", "left out"]
    return "\n".join([first, *table(headings, rows)])


def stop(fleet: Folder, now: bool) -> str:
    """Tell the server to end; returns what it will do. Raises UserError if there is none."""
    found = serving(fleet)
    if found is None or found["pid"] is None:
        raise UserError(f"{fleet.path}: nothing is served")
    try:
        os.kill(found["pid"], signal.SIGTERM if now else signal.SIGINT)
    except OSError as error:
        raise UserError(f"process {found['pid']}, which serves {fleet.path}: {error.strerror}") from None
    return (
        f"{found['run']} ends {'now' if now else 'after its round'}; `hfedmoe serve --resume {found['run']}` continues"
    )
