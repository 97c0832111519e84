"""What `hfedmoe serve` refuses, whom it knows, and what it notes."""

import contextlib
import errno
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
from flwr.proto.node_pb2 import NodeInfo

from hfedmoe.events import ClientRound, Participant, Silent
from hfedmoe.files.disk import replacing
from hfedmoe.files.locks import claim
from hfedmoe.fleet import keys
from hfedmoe.fleet.folder import opened
from hfedmoe.fleet.front import Board, Seen
from hfedmoe.fleet.keys import as_flower_has_it, new_key, private_key, public_of
from hfedmoe.fleet.notes import Notes
from hfedmoe.fleet.serving import EndsHere, FleetRoll, ending
from hfedmoe.runs.identity import DEPLOYED, SIMULATED, Identity, write_identity
from hfedmoe.server.members import Known
from tests.fleet.places import HOST, hfedmoe, new_fleet


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert hfedmoe(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_cannot_be_served_is_one_line_and_leaves_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new_fleet(here)
    assert "no device is invited" in refused(capsys, "serve", "tiny", "--out", "run")
    hfedmoe("invite", "north")
    assert "pools the rows" in refused(capsys, "serve", "tiny", "--out", "run", "--set", "method.name=pooled")
    assert "give a config" in refused(capsys, "serve", "--out", "run")
    assert "leave --out and --set out" in refused(capsys, "serve", "--resume", "run", "--out", "run")
    assert "no such run folder" in refused(capsys, "serve", "--resume", "run")
    assert "no fleet here" in refused(capsys, "serve", "tiny", "--fleet", "elsewhere")
    assert not (here / "run").exists()


def test_a_run_of_one_machine_is_never_continued_with_devices(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new_fleet(here, "north")
    assert hfedmoe("run", "tiny", "--out", "run", "--set", "federation.rounds=1") == 0
    assert "not a run of `hfedmoe serve`; `hfedmoe resume run`" in refused(capsys, "serve", "--resume", "run")
    identity = json.loads((here / "run" / "run.json").read_text())
    assert identity["carrier"] == SIMULATED
    write_identity(here / "run", Identity(**identity | {"carrier": DEPLOYED}))
    assert "`hfedmoe serve --resume run` continues a run of `hfedmoe serve`" in refused(capsys, "resume", "run")


def test_a_fleet_is_served_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new_fleet(here, "north")
    with (here / "fleet" / "serve.lock").open("ab") as lock:
        claim(lock.fileno())
        assert "is served by another process" in refused(capsys, "serve", "tiny")


def test_devices_are_known_by_their_keys(here: Path) -> None:
    new_fleet(here, "north", "south")
    hfedmoe("invite", "east", "--max-examples", "7")
    board = Board(opened(here / "fleet"))
    keys = {device.name: key for key, device in board.invited().items()}
    stranger = as_flower_has_it(public_of(private_key(new_key(), "test")))
    nodes = {11: keys["east"], 12: stranger, 13: keys["north"]}
    until = {11: time.time() + 50, 12: time.time() + 50, 13: time.time() + 29}  # signs of life are due every 30 s
    grid: Any = SimpleNamespace(
        get_nodes=lambda: [
            NodeInfo(node_id=node, public_key=key, online_until=until[node], heartbeat_interval=30)
            for node, key in nodes.items()
        ]
    )
    roll = FleetRoll(board)
    assert roll.here(grid) == {11: Known(2, "east", 7), 13: Known(0, "north", overdue=True)}
    assert roll.expected() == ["north", "south", "east"]
    hfedmoe("remove", "north")
    assert list(roll.here(grid)) == [11]
    assert roll.expected() == ["south", "east"]


def test_status_shows_what_the_server_notes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new_fleet(here, "north", "south", "east")
    board = Board(opened(here / "fleet"))
    board.seen["north"] = Seen(time.time() - 3, "hfedmoe 0.1.0")
    board.seen["south"] = Seen(time.time() - 300)
    with (here / "fleet" / "serve.lock").open("ab") as lock, Notes(Silent(), board, here / "run") as notes:
        claim(lock.fileno())
        notes.cannot_join("east", "its own rows do not fit")
        notes.start("run", 5, 1, [Participant("north", 90, 16, 0.5), Participant("south", 80, 8, 0.25)])
        notes.round_started(2)
        notes.client_done(2, 1, ClientRound(client=1, status="late", reason="no reply"))
        capsys.readouterr()
        assert hfedmoe("status") == 0
        first, head, north, south, east = capsys.readouterr().out.splitlines()
    assert first == f"{here / 'run'}: round 2 of 5, training"
    assert head.split()[:3] == ["device", "here", "last"]
    assert north.split() == ["north", "yes", "3", "s", "ago", "90", "16", "hfedmoe", "0.1.0", "from", "round", "1", "-"]
    assert south.split()[:4] == ["south", "no", "300", "s"]
    assert south.endswith("round 2: late: no reply")
    assert east.split()[:3] == ["east", "no", "never"]
    assert east.endswith("its own rows do not fit")
    assert not (here / "fleet" / "serving.json").exists()
    assert "nothing is served" in refused(capsys, "stop")


def test_a_round_ends_before_the_run_does(here: Path) -> None:
    new_fleet(here, "north")
    with Notes(Silent(), Board(opened(here / "fleet")), here / "run") as notes, ending(notes) as asked:
        notes.round_started(1)
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with Notes(Silent(), Board(opened(here / "fleet")), here / "run") as notes, ending(notes):
        with pytest.raises(EndsHere):  # nothing is lost outside of a round
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with Notes(Silent(), Board(opened(here / "fleet")), here / "run") as notes, ending(notes):
        notes.round_started(1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_status_says_who_came_and_went(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new_fleet(here, "north", "south", "east")
    board = Board(opened(here / "fleet"))

    def shown() -> dict[str, str]:
        capsys.readouterr()
        assert hfedmoe("status", "--json") == 0
        return {one["name"]: one["takes_part"] for one in json.loads(capsys.readouterr().out)["devices"]}

    with (here / "fleet" / "serve.lock").open("ab") as lock, Notes(Silent(), board, here / "run") as notes:
        claim(lock.fileno())
        notes.start("run", 5, 1, [Participant("north", 90, 16, 0.5), Participant("south", 80, 8, 0.25)])
        assert shown() == {"north": "from round 1", "south": "from round 1", "east": ""}
        notes.round_started(1)
        notes.client_done(1, 0, ClientRound(client=0, status="left", reason="is no longer connected"))
        notes.left(0)
        notes.round_done(1, 1.0, 1, 1)
        notes.joined(2, Participant("east", 70, 8, 0.25), False)
        notes.left(1)
        assert shown() == {"north": "left in round 1", "south": "left after round 1", "east": "from round 2"}
        notes.round_started(2)
        notes.round_done(2, 1.0, 1, 1)
        notes.joined(0, Participant("north", 91, 16, 0.5), True)
        assert shown()["north"] == "again from round 3"
        assert hfedmoe("status") == 0
        assert all(line.endswith(" -") for line in capsys.readouterr().out.splitlines()[2:])  # nobody is left out


def full(_: object) -> None:
    """What opening a file on a full disk does."""
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_run_goes_on_while_the_fleets_disk_is_full(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    new_fleet(here, "north")
    said: list[str] = []
    watcher = Silent()
    monkeypatch.setattr(watcher, "warning", said.append)
    with Notes(watcher, Board(opened(here / "fleet")), here / "run") as notes:
        with monkeypatch.context() as patch:
            patch.setattr("hfedmoe.fleet.notes.replacing", full)
            notes.round_started(1)
            notes.round_started(2)
            notes.write()
        (warning,) = said  # once
        assert "serving.json: cannot be written (No space left on device), so `hfedmoe status` shows" in warning
        notes.write()
        assert json.loads((here / "fleet" / "serving.json").read_text())["round"] == 2
    monkeypatch.setattr("hfedmoe.fleet.roster.replacing", full)
    for command in ("remove", "invite"):
        name = "north" if command == "remove" else "south"
        assert "roster.json: cannot be written (No space left on device)" in refused(capsys, command, name)
    assert not (here / "south.invite").exists()
    assert "cannot be written (No space left" in refused(capsys, "serve", "init", HOST, "--fleet", "other")
    monkeypatch.setattr("hfedmoe.fleet.serving.replacing", full)
    assert "fleet.json: cannot be written (No space left on device)" in refused(
        capsys, "serve", "tiny", "--out", "runs/x", "--listen", HOST
    )
    assert not (here / "runs" / "x").exists()  # nothing has run, so nothing stays


def test_notes_take_a_small_share_of_the_time_however_many_devices_there_are(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_fleet(here, "north")
    now, written = [0.0], []

    @contextlib.contextmanager
    def slow(path: Path) -> Iterator[BinaryIO]:
        now[0] += 4.0  # as long as 100,000 devices take
        written.append(now[0])
        with replacing(path) as stream:
            yield stream

    monkeypatch.setattr("hfedmoe.fleet.notes.replacing", slow)
    notes = Notes(Silent(), Board(opened(here / "fleet")), here / "run", lambda: now[0])
    notes.start("run", 5, 1, [Participant("north", 90, 16, 0.5)])
    assert len(written) == 1
    for round in range(1, 401):  # 200 s, with an event and a look twice a second
        now[0] += 0.5
        notes.round_started(round)
        notes.write()
    assert 4.0 * len(written) <= 0.1 * now[0] + 2 * 4.0
    assert len(written) > 3
    now[0] += 100.0
    notes.write()  # what was left out is written by the next look that has the time
    assert json.loads((here / "fleet" / "serving.json").read_text())["round"] == 400


def test_the_key_of_a_device_is_read_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_fleet(here, "north", "south")
    read: list[bytes] = []
    before = keys.load_ssh_public_key
    board = Board(opened(here / "fleet"))
    board.invited()
    monkeypatch.setattr(keys, "load_ssh_public_key", lambda line: read.append(line) or before(line))
    hfedmoe("remove", "north")
    assert [device.name for device in board.invited().values()] == ["south"]
    assert read == []
