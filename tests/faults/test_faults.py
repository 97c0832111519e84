"""What breaks between a server and its devices, and what is left of the work. `make faults` runs it; it takes minutes.

One server and three devices, as processes, with TLS and keys. One device's line to the server can be cut or slow.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from hfedmoe.files.cache import cache_folder
from hfedmoe.runs.folder import RunFolder
from tests.deployment.nodes import rows_file
from tests.faults.line import Line
from tests.fleet.places import HOST, free_port, hfedmoe, save_tiny
from tests.fleet.processes import Command, Commands, commands

pytestmark = pytest.mark.faults
NAMES = ("north", "south", "east")
GONE = ("left", "absent")
CONFIG = """
threads = 1
name = "faults"
keep_checkpoints = 2
[model]
name = "{folder}/base"
[clients]
budgets = ["100%"]
[federation]
rounds = 5000
timeout_s = 40
[train]
steps = 2
batch_size = 4
[evaluation]
watch_rows = 0
own_share = 0
[partition]
min_rows = 1
[data]
source = "{folder}/public.csv"
test = "{folder}/test.csv"
"""


class Place:
    """A served run, and what happens to it."""

    def __init__(self, folder: Path, started: Commands) -> None:
        self.folder, self._started = folder, started
        save_tiny(folder / "base")
        for name, rows in {"public": 9, "test": 6, **dict.fromkeys(NAMES, 12)}.items():
            rows_file(folder / f"{name}.csv", "earn", "acq", "crude", rows=rows)
        (folder / "my.toml").write_text(CONFIG.format(folder=folder))
        self.port = free_port()
        assert hfedmoe("serve", "init", HOST, "--port", str(self.port)) == 0
        for name in NAMES:
            assert hfedmoe("invite", name) == 0
        self.line = Line((HOST, self.port))
        invitation = folder / "north.invite"
        invitation.write_text(json.dumps(json.loads(invitation.read_text()) | {"port": self.line.port}))
        (folder / "disk").mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder / "disk")]
        self.small_disk = may_mount(command)
        """Whether the run folder is on a small disk of its own."""
        self.run = folder / "disk" / "run"
        self.servers = [self._serve("my.toml", "--out", str(self.run))]
        self.devices = {name: self.join(name) for name in NAMES}
        self.server.wait_for("round 2/5000 done")

    def _serve(self, *arguments: str) -> Command:
        return self._started.start(
            f"server{len(list(self.folder.glob('server*')))}", "serve", *arguments, "--listen", HOST
        )

    @property
    def server(self) -> Command:
        return self.servers[-1]

    def serve_again(self) -> None:
        self.servers.append(self._serve("--resume", str(self.run)))

    def join(self, name: str, env: Mapping[str, str] | None = None) -> Command:
        number = len(list(self.folder.glob(f"{name}-*.log")))
        given = ["--data", f"{name}.csv", "--budget", "100%", "--model", "base"]
        return self._started.start(f"{name}-{number}", "join", f"{name}.invite", *given, env=env)

    def rounds(self) -> list[dict[str, Any]]:
        """The lines of the rounds that are finished."""
        return [line for line in RunFolder.open(self.run).read_rounds() if line["round"]]

    def more_rounds(self, number: int = 1, within_s: float = 240.0) -> list[dict[str, Any]]:
        """The lines of the next rounds."""
        before, deadline = len(self.rounds()), time.monotonic() + within_s
        while len(found := self.rounds()) < before + number:
            assert time.monotonic() < deadline, f"no {number} rounds within {within_s:.0f} s:\n{self.server.said}"
            assert self.server.process.poll() is None, self.server.said
            time.sleep(0.2)
        return found[before:]

    def until(self, *statuses: str, name: str = "north", within_s: float = 240.0) -> tuple[dict[str, Any], float]:
        """The first new round in which a device has one of these statuses, and the seconds until it was finished.

        "absent": it is not asked, because it was gone before the round.
        """
        begin = time.monotonic()
        while True:
            (line,) = self.more_rounds(1, within_s)
            found = {row["client"]: row["status"] for row in line["clients"]}.get(NAMES.index(name), "absent")
            if found in statuses:
                return line, time.monotonic() - begin
            assert time.monotonic() - begin < within_s, f"{name} is {found}, not {statuses}:\n{self.server.said}"

    def kill(self, name: str) -> None:
        """Kill everything of a device at once, as when its machine dies."""
        tree = psutil.Process(self.devices[name].process.pid)
        for process in (*tree.children(recursive=True), tree):
            process.kill()

    def processes(self, name: str, of: str) -> list[psutil.Process]:
        """The processes of a device whose command contains a word."""
        own = psutil.Process(self.devices[name].process.pid).children(recursive=True)
        return [process for process in own if any(of in word for word in process.cmdline())]


def may_mount(command: list[str]) -> bool:
    """Whether this command could mount a file system."""
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0


def note(what: str, **figures: object) -> None:
    """Print what was measured, for docs/reliability.md."""
    print("fault:", json.dumps({"fault": what, **figures}))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch, commands(folder) as started:
        patch.chdir(folder)
        served = Place(folder, started)
        try:
            yield served
        finally:
            if served.small_disk:
                subprocess.run(["umount", "--lazy", str(folder / "disk")], check=True)


@pytest.fixture(autouse=True)
def nothing_is_lost(place: Place) -> Iterator[None]:
    """Before and after each fault all take part, and every finished round of before is there afterwards."""
    place.until("ok")
    before = place.rounds()
    yield
    place.until("ok", within_s=300)
    assert place.rounds()[: len(before)] == before
    assert [line["round"] for line in place.rounds()] == list(range(1, len(place.rounds()) + 1))
    for line in place.rounds():
        assert line["short"] == any(row["status"] != "ok" for row in line["clients"])


def test_a_device_that_is_killed_while_it_trains_comes_back(place: Place) -> None:
    (worker,) = place.processes("north", "hfedmoe.fleet.worker")
    deadline, notes = time.monotonic() + 240, cache_folder() / "devices"
    began = time.time()
    while True:  # a device notes what it attempts
        assert time.monotonic() < deadline
        with contextlib.suppress(OSError):
            own = [path for path in notes.glob("*-client-0.json") if path.stat().st_mtime >= began]
            if any('"train"' in path.read_text() for path in own):
                break
    worker.kill()  # `join` starts it again
    line, seconds = place.until("ok")
    place.devices["north"].wait_for("the worker ended (killed")
    note("device killed while it trains", seconds_until_it_takes_part=round(seconds), short=line["short"])


def test_a_device_that_dies_while_it_sends_is_missed_and_comes_back(place: Place) -> None:
    place.line.up_bytes_s = 20e3
    try:
        before, deadline = place.line.up, time.monotonic() + 240
        while place.line.up < before + 100_000:  # of 383 kB; all other messages of a round are a few kB
            assert time.monotonic() < deadline
            time.sleep(0.05)
        place.kill("north")
        _, missed = place.until("failed", "late", *GONE)
    finally:
        place.line.up_bytes_s = None
    place.devices["north"] = place.join("north")
    _, back = place.until("ok")
    note("device killed while it sends", seconds_until_missed=round(missed), seconds_until_it_takes_part=round(back))


def test_a_device_whose_machine_dies_is_missed_and_comes_back(place: Place) -> None:
    place.kill("north")
    line, missed = place.until(*GONE)
    assert line["short"] == (len(line["clients"]) == 3)
    place.devices["north"] = place.join("north")
    _, back = place.until("ok")
    note("device killed", seconds_until_missed=round(missed), seconds_until_it_takes_part_again=round(back))


def test_a_device_that_hangs_costs_its_time_to_answer(place: Place) -> None:
    (worker,) = place.processes("north", "hfedmoe.fleet.worker")
    worker.send_signal(signal.SIGSTOP)
    try:
        line, seconds = place.until("late")  # it still has a heart: its SuperNode is another process
        assert line["seconds"] < 40 + 30  # federation.timeout_s, and what the others take
        place.more_rounds(2)  # without it
    finally:
        worker.send_signal(signal.SIGCONT)
    note("device hangs", seconds_of_the_round=round(line["seconds"]), timeout_s=40, seconds_until_seen=round(seconds))


@pytest.mark.parametrize("days", [-30, -1, 1])
def test_a_device_whose_clock_is_wrong_waits_until_it_is_set(place: Place, days: int) -> None:
    """Its processes start again after it is set, as they do when a machine boots."""
    faketime = pytest.importorskip("libfaketime", reason="a clock is only wrong with `pip install libfaketime`")
    env = dict(faketime.get_reload_information()[1]) | {"FAKETIME": f"{days:+d}d"}
    place.devices["north"].process.terminate()
    assert place.devices["north"].ended() == 0
    wrong = place.join("north", env)
    wrong.wait_for("set the clock")
    place.until(*GONE)
    assert wrong.process.poll() is None
    wrong.process.terminate()
    assert wrong.ended() == 0
    place.devices["north"] = place.join("north")
    _, back = place.until("ok")
    note(f"clock wrong by {days} days", seconds_until_it_takes_part_again=round(back))


def test_a_device_whose_disk_is_full_is_left_out_until_there_is_room(place: Place) -> None:
    folder = place.folder / "north.device"
    place.devices["north"].process.terminate()
    assert place.devices["north"].ended() == 0
    place.until(*GONE)
    if not may_mount(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]):
        place.devices["north"] = place.join("north")
        pytest.skip("mounting a file system is not allowed here")
    try:
        place.devices["north"] = place.join("north")
        place.until("ok")
        (folder / "other").write_bytes(bytes(shutil.disk_usage(folder).free))
        _, refused = place.until("failed")
        place.more_rounds(2)
        assert place.devices["north"].process.poll() is None
        (folder / "other").unlink()
        _, back = place.until("ok")
        place.devices["north"].process.terminate()
        assert place.devices["north"].ended() == 0
    finally:
        place.devices["north"].process.kill()
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    place.devices["north"] = place.join("north")
    note("disk of a device full", seconds_until_refused=round(refused), seconds_until_it_takes_part_again=round(back))


def test_a_line_that_is_cut_for_a_minute_and_more(place: Place) -> None:
    with place.line.cut():
        _, missed = place.until(*GONE, within_s=200)
        place.more_rounds(2)  # without it
    _, back = place.until("ok")
    note("line cut", seconds_until_missed=round(missed), seconds_until_it_takes_part_again=round(back))


def test_a_line_whose_connections_break(place: Place) -> None:
    for _ in range(3):
        place.server.wait_for_since(len(place.server.said), ": held ")  # in a round
        place.line.reset()
    line, seconds = place.until("ok")
    note("connections reset three times", seconds_until_it_takes_part=round(seconds), short=line["short"])


def test_a_line_of_300_ms(place: Place) -> None:
    near = sum(line["seconds"] for line in place.more_rounds(3)) / 3
    place.line.delay_s = 0.3
    try:
        far = sum(place.until("ok")[0]["seconds"] for _ in range(3)) / 3
    finally:
        place.line.delay_s = 0.0
    assert far < near + 15  # some tens of requests, one after the other
    note("300 ms in each direction", seconds_of_a_round=round(far, 1), without=round(near, 1))


def test_a_slow_upload(place: Place) -> None:
    near = place.until("ok")[0]["seconds"]
    place.line.up_bytes_s = 1e6 / 8
    try:
        (line,) = [place.until("ok")[0]]
    finally:
        place.line.up_bytes_s = None
    bytes_up = next(row["bytes_up"] for row in line["clients"] if row["client"] == 0)
    note("1 Mbit/s up", seconds_of_a_round=round(line["seconds"], 1), without=round(near, 1), kB=bytes_up // 1000)


@pytest.mark.parametrize("moment", ["in a round", "between rounds"])
def test_the_superlink_is_killed(place: Place, moment: str) -> None:
    own = psutil.Process(place.server.process.pid).children(recursive=True)
    links = [process for process in own if any("flower-superlink" in word for word in process.cmdline())]
    assert links
    (line,) = place.more_rounds()
    if moment == "in a round":
        place.server.wait_for_since(len(place.server.said), ": held ")
    begin = time.monotonic()
    for link in links:
        link.kill()
    place.more_rounds(2, within_s=300)
    seconds = time.monotonic() - begin
    note(f"SuperLink killed {moment}", after=line["round"], seconds_until_two_more_rounds=round(seconds))


def test_the_server_is_killed_and_goes_on(place: Place) -> None:
    place.more_rounds()
    tree = psutil.Process(place.server.process.pid)
    begin, done = time.monotonic(), len(place.rounds())
    for process in (tree, *tree.children(recursive=True)):
        process.kill()
    place.server.process.wait()
    assert len(place.rounds()) >= done
    place.serve_again()
    place.more_rounds(1, within_s=300)
    note("server killed", seconds_until_the_next_round=round(time.monotonic() - begin))


def test_the_disk_of_the_run_folder_is_full(place: Place) -> None:
    if not place.small_disk:
        pytest.skip("mounting a file system is not allowed here")
    place.more_rounds()
    done, other = len(place.rounds()), place.run.parent / "other"
    other.write_bytes(bytes(shutil.disk_usage(place.run).free))
    assert place.server.ended() == 2, place.server.said
    last = place.server.said.splitlines()[-1]
    assert "No space left" in last
    assert "--resume" in last
    assert len(place.rounds()) >= done
    other.unlink()
    begin = time.monotonic()
    place.serve_again()
    place.more_rounds(1, within_s=300)
    note("disk of the server full", seconds_until_the_next_round=round(time.monotonic() - begin), said=last)
