"""`hfedmoe serve`: a run whose clients are devices on machines of their own."""

import contextlib
import json
import logging
import secrets
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

from flwr.serverapp import Grid

from hfedmoe.config import RunConfig
from hfedmoe.data.terms import terms_of
from hfedmoe.errors import UserError
from hfedmoe.events import Watcher
from hfedmoe.files.disk import SERVED, disk_errors, replacing
from hfedmoe.files.locks import HeldError, claim
from hfedmoe.fleet.folder import Folder
from hfedmoe.fleet.front import Board, front
from hfedmoe.fleet.notes import Notes
from hfedmoe.fleet.offer import offer_of
from hfedmoe.fleet.roster import Roster
from hfedmoe.fleet.superlink import superlink
from hfedmoe.method.methods import METHODS
from hfedmoe.prepare import Prepared, prepare, server_for
from hfedmoe.report.tracking.tracking import tracked
from hfedmoe.runs.folder import RunFolder
from hfedmoe.runs.identity import DEPLOYED, check_identity, identity_of, read_identity, write_identity
from hfedmoe.runs.log import logging_to
from hfedmoe.runs.paths import with_absolute_paths
from hfedmoe.runs.refusals import require_trackers
from hfedmoe.server.keeper import Keeper
from hfedmoe.server.members import Known
from hfedmoe.wire.same import Digests

CONTINUED_BY = "hfedmoe serve --resume"


def serve(fleet: Folder, config: RunConfig, out: Path | None, address: str, watcher: Watcher) -> Path:
    """Run a federation with the devices on a fleet's roster, from its first round; returns the run folder.

    Raises:
        UserError: the configuration, model, data or folder cannot be used, no device is invited, or too few of them
            gave a valid update.
    """
    require_trackers(config.tracking)
    with only_one(fleet):
        config = for_roster(with_absolute_paths(config), Roster.read(fleet.roster))
        with RunFolder.create(out, config) as folder:
            try:
                _write_key(folder.path)
                prepared = prepare(config, watcher)
            except BaseException:  # nothing has run: the same folder can be used again
                (folder.path / SERVED).unlink(missing_ok=True)
                folder.discard()
                raise
            folder.settle(prepared.settled)
            write_identity(folder.path, _identity(prepared))
            folder.describe(prepared.about(None))
            _serve(fleet, folder, prepared, None, address, watcher)
            return folder.path


def resume(fleet: Folder, path: Path, address: str, watcher: Watcher) -> None:
    """Go on with a run after its last checkpoint; its devices remember what they learned.

    Raises:
        UserError: not a run of `serve`, its data or model changed, or as `serve`.
    """
    with only_one(fleet), RunFolder.open(path, to_write=True) as folder:
        was = read_identity(path)
        if was is None or was.carrier != DEPLOYED or not (path / SERVED).is_file():
            raise UserError(
                f"{path}: not a run of `hfedmoe serve`; `hfedmoe resume {path}` continues a run of one machine"
            )
        require_trackers(folder.config.tracking)
        config = for_roster(folder.config, Roster.read(fleet.roster))
        prepared = prepare(config, watcher)
        check_identity(path, _identity(prepared))
        round = folder.load_checkpoint("last").round if folder.saved_rounds() else None
        folder.rewind(-1 if round is None else round)
        _serve(fleet, folder, prepared, round, address, watcher)


def _identity(prepared: Prepared) -> Any:
    return identity_of(prepared.config, prepared.task, prepared.watch, DEPLOYED)


def for_roster(config: RunConfig, roster: Roster) -> RunConfig:
    """The configuration with as many clients as the roster has numbers. Raises UserError if nobody is invited."""
    if not roster.devices:
        raise UserError("no device is invited; `hfedmoe invite NAME` invites one")
    if METHODS[config.method.name].pooled:
        raise UserError(f"method.name = {config.method.name} pools the rows of all clients, which no device gives away")
    return config.model_copy(update={"clients": config.clients.model_copy(update={"count": roster.count})})


def _write_key(path: Path) -> None:
    with disk_errors(path / SERVED, "serve again"), replacing(path / SERVED) as stream:
        stream.write(json.dumps({"run": secrets.token_hex(16)}).encode())


def _read_key(path: Path) -> str:
    """Raises UserError if it is damaged."""
    try:
        return str(json.loads((path / SERVED).read_text())["run"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path / SERVED}: is damaged ({error}), so devices would not know the run; begin a new one"
        ) from None


def _serve(
    fleet: Folder, folder: RunFolder, prepared: Prepared, from_round: int | None, address: str, watcher: Watcher
) -> None:
    prepared.announce(watcher, folder)
    key = _read_key(folder.path)
    board = Board(fleet)
    with contextlib.ExitStack() as stack:
        stack.enter_context(logging_to(folder.path))
        _quieten_flower()
        notes = stack.enter_context(Notes(watcher, board, folder.path))
        keeper = Keeper(folder, from_round=from_round, continued_by=CONTINUED_BY)
        stack.enter_context(tracked(prepared.settled, folder, notes, from_round)).follow(keeper)
        tensors = None if from_round is None else prepared.restore(folder, from_round).tensors
        terms = terms_of(prepared.task, prepared.config.data, prepared.encoder.first_token_only)
        offer = offer_of(prepared, terms, key)
        server = server_for(prepared, keeper, notes, tensors, from_round or 0, Digests(offer.base, offer.tokenizer))
        link = stack.enter_context(superlink(fleet, lambda: look()))
        registered: list[Any] = [None]

        said: dict[str, str] = {}

        def look() -> None:
            invited = board.invited()
            if registered[0] is not invited:
                link.register(invited)
                registered[0] = invited
            for name, reason in list(board.refused.items()):
                if said.get(name) != reason:
                    said[name] = reason
                    notes.warning(f"{name} is left out: {reason}")
                    notes.cannot_join(name, reason)
            notes.write()

        link.register(board.invited())
        link.stop_old_runs()
        board.upstream, board.offer = link.port, offer
        stack.enter_context(front(board, address, fleet.address()[1]))
        server.roll, server.asks_sites = FleetRoll(board), True
        wish = stack.enter_context(ending(notes))
        server.ends_early = lambda: wish.asked
        try:
            with link.serving(link.start_run({"config": offer.config, "run": key})) as grid:
                server.run(grid)
        except EndsHere:
            pass  # said below, as where a round ends first
        except KeyboardInterrupt:
            watcher.finish(f"stopped; `{CONTINUED_BY} {folder.path}` continues")
            raise
    if server.round < prepared.config.federation.rounds:
        watcher.finish(f"ended after round {server.round}; `{CONTINUED_BY} {folder.path}` continues")
        return
    watcher.finish(f"done: {folder.path}")
    keeper.show_totals(watcher)


@dataclass
class FleetRoll:
    """Who may take part: the devices on the roster, by their keys."""

    board: Board

    def expected(self) -> list[str]:
        """The names of all devices on the roster."""
        return [device.name for device in self.board.invited().values()]

    def here(self, grid: Grid) -> dict[int, Known]:
        """The devices that are connected, by node.

        Flower takes a node as connected until a second sign of life in a row is missing. Here one that is missing makes
        it overdue.
        """
        invited, now = self.board.invited(), time.time()
        found = [(node, invited.get(node.public_key)) for node in grid.get_nodes()]
        return {
            node.node_id: Known(
                device.number, device.name, device.max_examples, node.online_until - now < node.heartbeat_interval
            )
            for node, device in found
            if device is not None
        }


class EndsHere(BaseException):
    """The run's owner ends it between two rounds. Like KeyboardInterrupt it is no error that anything may catch."""


@dataclass
class Ending:
    """Whether the run's owner wants it to end after its round."""

    asked: bool = False


@contextlib.contextmanager
def ending(notes: Notes) -> Iterator[Ending]:
    """During the block, Ctrl-C lets the round end first; a second time, it ends at once.

    Outside of a round nothing is lost, and it ends the run there. SIGTERM ends at once: it comes from the system, which
    does not wait long.

    Raises:
        EndsHere: Ctrl-C outside of a round.
        KeyboardInterrupt: a second Ctrl-C, or SIGTERM.
    """
    wish = Ending()

    def interrupted(_: int, __: FrameType | None) -> None:
        if wish.asked:
            raise KeyboardInterrupt
        wish.asked = True
        if not notes.in_round:
            raise EndsHere
        notes.warning("ending after this round; once more ends now")

    def terminated(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupted), signal.signal(signal.SIGTERM, terminated)
    try:
        yield wish
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


@contextlib.contextmanager
def only_one(fleet: Folder) -> Iterator[IO[bytes]]:
    """Serve the fleet in this process only. Raises UserError if another one does."""
    with disk_errors(fleet.path, "serve again"):
        lock = (fleet.path / "serve.lock").open("ab")
    with lock:
        try:
            claim(lock.fileno())
        except HeldError:
            raise UserError(f"{fleet.path}: is served by another process; `hfedmoe status` shows it") from None
        yield lock


def _quieten_flower() -> None:
    logging.getLogger("flwr").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
