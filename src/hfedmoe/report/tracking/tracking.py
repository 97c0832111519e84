"""All trackers of a run."""

import shlex
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from hfedmoe.config import RunConfig
from hfedmoe.events import ClientRound, SiteGain, Watcher
from hfedmoe.report.tracking.figures import bytes_of, of_gains, of_round
from hfedmoe.report.tracking.process import LOG
from hfedmoe.report.tracking.sender import Item, Sender
from hfedmoe.report.tracking.settings import told
from hfedmoe.report.tracking.start import FAILED, FINISHED, STOPPED, Start, Status
from hfedmoe.report.tracking.state import State
from hfedmoe.runs.folder import RunFolder
from hfedmoe.server.keeper import Keeper

REPLACES = {"tensorboard"}
"""Where rounds that are sent again take the place of the old ones."""
INTERRUPTED_S = 15.0
"""Most seconds that a run which did not end as it should waits for its trackers."""
KILLED_S = 5.0
"""Seconds to wait for the thread of a tracker whose process was killed."""


class Tracking:
    """Tells the trackers of a run what is written in its folder. No method waits for a tracker, or fails with one."""

    def __init__(
        self, senders: list[Sender], every_client: bool, watcher: Watcher, later: str, bytes_before: int
    ) -> None:
        self.senders = senders
        self._bytes = bytes_before
        self.last = -1
        """The last round that the run has."""
        self._every_client, self._watcher, self._later = every_client, watcher, later
        self._said: set[str] = set()
        self._warned: set[str] = set()

    def follow(self, keeper: Keeper) -> None:
        """Send what this keeper writes from now on."""
        keeper.completed, keeper.gained = self.round, self.gains

    def round(self, line: dict[str, Any], clients: Iterable[ClientRound]) -> None:
        """A round is complete, with its checkpoint: its line of metrics.jsonl, and its clients."""
        self.last = line["round"]
        if self.senders:
            self._put(Item(self.last, of_round(line, clients, self._every_client, self._bytes)))
            self._bytes += bytes_of(line)

    def gains(self, gains: Iterable[SiteGain]) -> None:
        """What the sites gained, at the end of a run."""
        if self.senders and (figures := of_gains([gain.to_json() for gain in gains], self._every_client)):
            self._put(Item(self.last, figures, gains=True))

    def say(self) -> None:
        """Tell the watcher where the trackers' runs are, and once for each that it failed."""
        for sender in self.senders:
            while sender.places:
                place = sender.places.popleft()
                if sender.tracker not in self._said:
                    self._said.add(sender.tracker)
                    self._watcher.note(f"tracking: {sender.tracker}: {place}")
            if sender.failure is not None and sender.tracker not in self._warned:
                self._warned.add(sender.tracker)
                self._watcher.warning(f"tracking: {sender.tracker}: {sender.failure}; {self._later}")

    def _put(self, item: Item) -> None:
        for sender in self.senders:
            sender.put(item)
        self.say()


@contextmanager
def tracked(
    config: RunConfig, folder: RunFolder | None, watcher: Watcher, from_round: int | None, wait_s: float | None = None
) -> Iterator[Tracking]:
    """The trackers of a run, which are closed after the block.

    Args:
        config: of the run, as it is told.
        from_round: round of the checkpoint from which the run continues; None: it begins.
        wait_s: most seconds that the block's end takes; None: `tracking.timeout_s`. or less if the run failed.

    Raises:
        UserError: tracking.json is damaged.
    """
    settings = config.tracking
    state = State(None if folder is None or not settings.to else folder.path)
    senders = [_sender(name, config, folder, state, from_round) for name in settings.to]
    later = "the run goes on"
    if folder is not None:
        later += f"; `hfedmoe track {shlex.quote(str(folder.path))}` sends what is missing, after the run"
    before = 0
    if folder is not None and senders and from_round is not None:
        before = sum(bytes_of(line) for line in folder.iter_rounds() if line["round"] <= from_round)
    tracking = Tracking(senders, settings.clients, watcher, later, before)
    tracking.last = -1 if from_round is None else from_round
    for sender in senders:
        if sender.sent > tracking.last >= 0:
            watcher.note(
                f"tracking: {sender.tracker} has rounds up to {sender.sent} already; those that are done again are not "
                "sent again"
            )
    status = FAILED
    try:
        yield tracking
        status = FINISHED if tracking.last >= config.federation.rounds else STOPPED
    except KeyboardInterrupt:
        status = STOPPED
        raise
    finally:
        most = settings.timeout_s if status == FINISHED else min(settings.timeout_s, INTERRUPTED_S)
        _close(tracking, status, most if wait_s is None else wait_s)
        state.close()


def _sender(name: str, config: RunConfig, folder: RunFolder | None, state: State, from_round: int | None) -> Sender:
    settings = config.tracking
    start = Start(
        key=state.key,
        project=settings.project,
        name=settings.run_name or (config.name if folder is None else folder.path.resolve().name),
        group=settings.group,
        tags=settings.tags,
        config=told(config),
        folder=None if folder is None else str(folder.path.absolute()),
        store=settings.mlflow_uri if name == "mlflow" else None,
        next_round=0,
    )

    def recorded(after: int) -> Iterator[Item]:
        """What the folder has of complete rounds."""
        before = 0
        for line in [] if folder is None else folder.iter_rounds():
            if line.get("failed"):
                continue
            if after < line["round"]:
                clients = map(ClientRound.from_json, line["clients"])
                yield Item(line["round"], of_round(line, clients, settings.clients, before))
                if "sites" in line:
                    yield Item(line["round"], of_gains(line["sites"], settings.clients), gains=True)
            before += bytes_of(line)

    log = None if folder is None else folder.path / LOG
    complete = -1 if from_round is None else from_round
    at_most = complete if name in REPLACES else None
    sender = Sender(name, start, state, None if folder is None else recorded, log, settings.timeout_s, at_most)
    for item in () if from_round is None else recorded(sender.sent - 1):  # what is there already is not put again
        if item.round <= complete:
            sender.put(item)
    sender.start()
    return sender


def _close(tracking: Tracking, status: Status, wait_s: float) -> None:
    for sender in tracking.senders:
        sender.close(status)
    until = time.monotonic() + wait_s
    try:
        for sender in tracking.senders:
            sender.join(max(0.0, until - time.monotonic()))
    finally:
        for sender in tracking.senders:
            if sender.is_alive():
                sender.give_up(f"not done within {wait_s:g} s")
                sender.join(KILLED_S)
    tracking.say()
