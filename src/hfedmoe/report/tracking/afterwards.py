"""Send the record of a run afterwards: what a tracker has not got, or all of it to another tracker."""

import threading
from collections.abc import Callable
from pathlib import Path

from hfedmoe.config import RunConfig
from hfedmoe.errors import UserError
from hfedmoe.events import Silent
from hfedmoe.report.tracking.tracking import tracked
from hfedmoe.runs.folder import RunFolder
from hfedmoe.runs.refusals import require_trackers


class _Places(Silent):
    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def note(self, text: str) -> None:
        """As `events.Watcher`."""
        self._say(text)


def send_record(path: Path, config: RunConfig, say: Callable[[str], None]) -> None:
    """Send what the folder of a run holds, up to its last complete round, to the trackers of `config.tracking`.

    Args:
        config: of the run, with its own or other settings of trackers.
        say: is told where they have it.

    Raises:
        UserError: no tracker is named or one is not installed, the run goes on, has no round, or a tracker fails.
    """
    if not config.tracking.to:
        raise UserError("tracking.to is empty; name a tracker: --set 'tracking.to=[\"tensorboard\"]'")
    require_trackers(config.tracking)
    with RunFolder.open(path, to_write=True) as folder:
        rounds = folder.saved_rounds() or [line["round"] for line in folder.iter_rounds() if not line.get("failed")]
        if not rounds:
            raise UserError(f"{path}: has no complete round yet")
        with tracked(config, folder, _Places(say), max(rounds), threading.TIMEOUT_MAX) as tracking:
            pass
        failed = [f"{sender.tracker}: {sender.failure}" for sender in tracking.senders if sender.failure is not None]
        if failed:
            raise UserError(f"{'; '.join(failed)}; what was sent is noted, so run the command again")
