"""`hfedmoe join --service`: a systemd user unit that joins whenever the machine runs."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from hfedmoe.client.policy import names_text
from hfedmoe.errors import UserError
from hfedmoe.files.disk import disk_errors, replacing
from hfedmoe.fleet.allowed import Allowed

UNIT = """\
# Written by `hfedmoe join --service`, which replaces this file; `systemctl --user edit {name}` is for your own changes.
[Unit]
Description=hfedmoe: device {device}
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
ExecStart={command}
WorkingDirectory={folder}
# It ends its own processes, so that the server knows at once that the device leaves.
KillMode=mixed
TimeoutStopSec=60
# Also where the server or this device must be changed first: nobody has to start it then.
Restart=on-failure
RestartSec=60
Nice=10
NoNewPrivileges=yes

[Install]
WantedBy=default.target
"""


def arguments(invitation: Path, key: Path | None, allowed: Allowed, folder: Path) -> list[str]:
    """The arguments of `hfedmoe` that join with these settings from any folder."""
    found = ["join", str(invitation.absolute()), "--data", str(allowed.data.expanduser().absolute())]
    found += ["--budget", str(allowed.budget), "--folder", str(folder.absolute())]
    model = allowed.model
    if model is not None and Path(model).expanduser().exists():
        model = str(Path(model).expanduser().absolute())
    policy = allowed.policy
    options = {
        "--model": model,
        "--key": None if key is None else str(key.absolute()),
        "--encoding": allowed.encoding,
        "--delimiter": allowed.delimiter,
        "--max-experts": policy.max_experts,
        "--max-steps": policy.max_steps,
        "--max-seconds": policy.max_seconds,
        "--min-batch": policy.min_batch,
        "--columns": None if policy.columns is None else names_text(policy.columns),
        "--labels": None if policy.labels is None else names_text(policy.labels),
    }
    for option, value in options.items():
        found += [] if value is None else [option, str(value)]
    for models in policy.models or ():
        found += ["--models", models]
    found += [] if policy.measure else ["--no-measure"]
    return found if policy.tune else [*found, "--no-tune"]


def unit(device: str, name: str, command: Sequence[str], folder: Path) -> str:
    """The text of a unit that runs a command in a folder."""
    return UNIT.format(
        device=device, name=name, command=" ".join(map(quoted, command)), folder=str(folder).replace("%", "%%")
    )


def quoted(word: str) -> str:
    """A word of a command as systemd reads it.

    Raises:
        UserError: it has a control character, which no unit can hold.
    """
    if not word.isprintable():
        raise UserError(f"{word!r}: has a character that cannot be in a service; give the file another name")
    word = word.replace("%", "%%").replace("$", "$$")
    if re.fullmatch(r"[\w@%+=:,./$-]+", word, re.ASCII):
        return word
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'


def write_service(device: str, invitation: Path, key: Path | None, allowed: Allowed, folder: Path) -> tuple[Path, str]:
    """Write the unit of a device; returns its path and its name.

    Raises:
        UserError: its rows are not there, or the unit cannot be written.
    """
    if not allowed.data.expanduser().is_file():
        raise UserError(f"--data {allowed.data}: no such file")
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd" / "user"
    name = f"hfedmoe-{device}.service"
    command = [sys.executable, "-m", "hfedmoe", *arguments(invitation, key, allowed, folder)]
    text = unit(device, name, command, invitation.absolute().parent)
    with disk_errors(home, "give the command again"):
        home.mkdir(parents=True, exist_ok=True)
        with replacing(home / name) as stream:
            stream.write(text.encode())
    return home / name, name
