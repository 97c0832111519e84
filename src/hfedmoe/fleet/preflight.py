"""`hfedmoe serve --check`: whether a run fits the devices that are here. Nothing is trained.

The server offers the run only to be checked. Devices that wait in `hfedmoe join` see that, check themselves as
`hfedmoe join --check` does, and tell codes and counts. No message goes through Flower, so no SuperLink is started.
"""

import secrets
import time
from dataclasses import dataclass

from hfedmoe.config import RunConfig
from hfedmoe.data.terms import terms_of
from hfedmoe.events import Watcher
from hfedmoe.fleet.findings import BUDGET, MODEL, ROWS, TOKENIZER, VERSIONS, Report
from hfedmoe.fleet.folder import Folder
from hfedmoe.fleet.front import Board, front
from hfedmoe.fleet.offer import TO_CHECK, offer_of
from hfedmoe.fleet.roster import Roster
from hfedmoe.fleet.serving import for_roster, only_one
from hfedmoe.prepare import prepare
from hfedmoe.report.table import table
from hfedmoe.runs.paths import with_absolute_paths

LOOK_S = 0.3


@dataclass(frozen=True)
class Preflight:
    """What the devices of a fleet found out about a run."""

    names: list[str]
    """Of all devices on the roster."""
    reports: dict[str, Report]
    refused: dict[str, str]
    """Why devices cannot take part, by name."""
    needed: int
    """`federation.min_clients`."""

    @property
    def fitting(self) -> list[str]:
        """The devices that fit."""
        return [name for name in self.names if name in self.reports and name not in self.refused]

    @property
    def fits(self) -> bool:
        """Whether all devices that are here fit, and are enough for a run."""
        return not self.refused and len(self.fitting) >= self.needed

    def as_text(self) -> str:
        """A table with a line per device, and the sum."""
        rows = [[name, *self._cells(name)] for name in self.names]
        away = [name for name in self.names if name not in self.reports and name not in self.refused]
        last = f"{len(self.fitting)} of {len(self.names)} devices fit"
        last += f"; not here: {', '.join(away)}" if away else ""
        if len(self.fitting) < self.needed:
            last += f"; federation.min_clients = {self.needed}"
        headings = ["device", "fits", "versions", "model", "rows", "tokenizer", "experts", "why not"]
        return "\n".join([*table(headings, rows), last])

    def _cells(self, name: str) -> list[str]:
        report, why_not = self.reports.get(name), self.refused.get(name, "")
        if report is None:
            return ["no" if why_not else "not here", *["-"] * 5, why_not or "-"]
        cells = ["no" if why_not else "yes"]
        for about in (VERSIONS, MODEL, ROWS, TOKENIZER, BUDGET):
            found = report.about(about)
            if found is None:
                cells.append("-")
            elif not found.fits:
                cells.append("no")
            else:
                counted = f"{found.count} of {found.of}" if found.of else str(found.count)
                cells.append(counted if about in (ROWS, BUDGET) else "yes")
        return [*cells, why_not or "-"]


def preflight(fleet: Folder, config: RunConfig, address: str, watcher: Watcher) -> Preflight:
    """Offer a run to be checked, until all devices on the roster have answered.

    It waits at most `federation.connect_timeout_s`, or until Ctrl-C.

    Raises:
        UserError: the configuration, model or data cannot be used, or no device is invited.
    """
    with only_one(fleet):
        config = for_roster(with_absolute_paths(config), Roster.read(fleet.roster))
        prepared = prepare(config, watcher)
        terms = terms_of(prepared.task, prepared.config.data, prepared.encoder.first_token_only)
        board = Board(fleet, offer=offer_of(prepared, terms, secrets.token_hex(16), TO_CHECK))
        with front(board, address, fleet.address()[1]):
            _await_reports(board, config.federation.connect_timeout_s, watcher)
        names = [device.name for device in board.invited().values()]
        here = {name: report for name, report in board.reports.items() if name in names}
        refused = {name: reason for name, reason in board.refused.items() if name in names}
        return Preflight(names, here, refused, config.federation.min_clients)


def _await_reports(board: Board, timeout_s: float, watcher: Watcher) -> None:
    deadline, said = time.monotonic() + timeout_s, None
    try:
        while time.monotonic() < deadline:
            names = [device.name for device in board.invited().values()]
            missing = [name for name in names if name not in board.reports and name not in board.refused]
            if missing != said:
                said = missing
                waiting = f", waiting for {', '.join(missing)}" if missing else ""
                watcher.phase(f"{len(names) - len(missing)} of {len(names)} devices checked{waiting}")
            if not missing:
                return
            time.sleep(LOOK_S)
    except KeyboardInterrupt:
        watcher.note("not waiting for the others")
