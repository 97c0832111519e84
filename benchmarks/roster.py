"""What a server of many invited devices spends on its notes for `hfedmoe status` and on reading its roster.

    python -m benchmarks.roster [--registered 100000] [--seconds 60] [--quick] [--json FILE]

In the seconds that are measured, the server notes ten events a second. No device is connected.
"""

import tempfile
import time
from pathlib import Path

from benchmarks.common import parser, report
from hfedmoe.events import Silent
from hfedmoe.fleet.folder import create
from hfedmoe.fleet.front import Board, Seen
from hfedmoe.fleet.keys import new_key, private_key, public_of
from hfedmoe.fleet.notes import Notes
from hfedmoe.fleet.roster import Invited, Roster

EVENT_S = 0.1


def main() -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--registered", type=int, default=100_000)
    arguments.add_argument("--seconds", type=float, default=60.0, help="for how long events are noted")
    arguments.add_argument("--quick", action="store_true", help="few devices, 2 seconds")
    given = arguments.parse_args()
    number, seconds = (100, 2.0) if given.quick else (given.registered, given.seconds)
    keys = [public_of(private_key(new_key(), "a device")) for _ in range(number)]
    devices = tuple(Invited(f"device-{n}", n, key) for n, key in enumerate(keys))
    with tempfile.TemporaryDirectory() as place:
        folder = create(Path(place) / "fleet", "127.0.0.1", 8000)
        Roster(devices).write(folder.roster)
        board = Board(folder)
        reading = []
        for stays in (number, number - 1):  # after the first time one device is removed
            Roster(devices[:stays]).write(folder.roster)
            started = time.perf_counter()
            board.invited()
            reading.append(time.perf_counter() - started)
        board.seen = {device.name: Seen(time.time(), "hfedmoe 0.1.0, flwr 1.42.0") for device in devices}
        notes = Notes(Silent(), board, Path(place))
        started = time.perf_counter()
        notes.write()
        one = time.perf_counter() - started
        spent, began = 0.0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            started = time.perf_counter()
            notes.phase("training")
            spent += time.perf_counter() - started
            time.sleep(EVENT_S)
        summary = {
            "registered": number,
            "seconds to read the roster": reading[0],
            "seconds to read it again after a change": reading[1],
            "MB of notes": folder.serving.stat().st_size / 1e6,
            "seconds to write them once": one,
            "share of the time spent on writing them": spent / (time.perf_counter() - began),
        }
    report([], summary, given.json)


if __name__ == "__main__":
    main()
