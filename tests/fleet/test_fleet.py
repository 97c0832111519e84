"""A server and three devices as processes on loopback, with TLS and keys, as their owners start them."""

import csv
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from hfedmoe.client.history import ClientHistory
from hfedmoe.config import load_config
from hfedmoe.data.partition import partition
from hfedmoe.events import Silent
from hfedmoe.fleet.invite import read_invitation
from hfedmoe.fleet.keys import new_key
from hfedmoe.fleet.memory import RunMemory
from hfedmoe.prepare import prepare
from hfedmoe.runs.folder import RunFolder
from hfedmoe.runs.refusals import is_installed
from hfedmoe.simulation import run
from tests.deployment.nodes import rows_file
from tests.fleet.places import HOST, free_port, hfedmoe, save_tiny
from tests.fleet.processes import Command, Commands, commands
from tests.report.tracking.records import tensorboard_series

NAMES = ("north", "south", "east")
BUDGETS = ("4GiB", "12", "100%")
PAGE = Path(__file__).parents[2] / "docs" / "deploy.md"
CONFIG = """
threads = 1
name = "e2e"
[model]
name = "{folder}/models/base"
[clients]
count = 3
budgets = ["4GiB", 12, "100%"]
[federation]
rounds = 2
min_clients = 3
[train]
steps = 2
batch_size = 4
[evaluation]
watch_rows = 0
[method]
bootstrap = "stream"
[partition]
min_rows = 1
[data]
test = "{folder}/test.csv"
"""


def settings(folder: Path, name: str, data: str) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(CONFIG.format(folder=folder) + data.format(folder=folder))
    return path


def in_one_process(folder: Path) -> None:
    """The same federation in this process; a device's file gets its client's rows in the order in which it trains."""
    for number in range(3):
        own = rows_file(folder / f"own{number}.csv", "earn", "acq", "crude", rows=9 + 3 * number)
        own.write_text(own.read_text().replace(",", " grain ship grain,").replace("text grain ship grain,", "text,"))
    files = ", ".join(f'"{{folder}}/own{number}.csv"' for number in range(3))
    config = load_config(settings(folder, "in-process", f"clients = [{files}]"))
    ready = prepare(config, Silent())
    parts = partition(ready.task, config.partition, 3, config.seed)
    run(config, folder / "in-process", Silent())
    for number, part in enumerate(parts):
        rows = [ready.task.train[index] for index in part]
        lines = [(row.text, row.choices[row.answer].strip()) for row in rows]
        with (folder / f"{NAMES[number]}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([("text", "label"), *lines])


class Page:
    """The commands of docs/deploy.md, each of which must be used."""

    def __init__(self, host: str, port: int) -> None:
        lines = [line for line in PAGE.read_text().splitlines() if line.startswith(("server$ ", "device$ "))]
        self._left = [shlex.split(line.partition("$ ")[2])[1:] for line in lines]
        self._host, self._port = host, port

    def command(self, *start: str) -> list[str]:
        """The next command of the page that starts with these words, on this machine's address."""
        found = next(one for one in self._left if one[: len(start)] == list(start))
        self._left.remove(found)
        extra = {"init": ["--port", str(self._port)], "run": ["--listen", self._host]}
        kind = "init" if start[:2] == ("serve", "init") else "run" if start[0] == "serve" else ""
        return [self._host if word == "fl.example.org" else word for word in found] + extra.get(kind, [])

    @property
    def left(self) -> list[list[str]]:
        return self._left


def who_comes_and_goes(
    started: Commands, devices: dict[str, Command], folder: Path, capsys: pytest.CaptureFixture[str]
) -> Command:
    """In a second run, east comes late, south is stopped, and north is killed and started again."""

    def again(name: str) -> Command:
        return started.start(f"{name}-again", *devices[name].arguments)

    devices["east"].process.terminate()
    assert devices["east"].ended() == 0
    settings = ("federation.rounds=60", "federation.min_clients=1", "federation.connect_timeout_s=30")
    overrides = [word for setting in settings for word in ("--set", setting)]
    server = started.start("second", "serve", "my.toml", "--out", "runs/second", "--listen", HOST, *overrides)
    server.wait_for("2 of 3 here, waiting for east")
    server.wait_for("round 1/60\n")
    again("east")
    server.wait_for("joined: east: 15 examples")
    devices["south"].process.terminate()
    server.wait_for("south left")
    devices["north"].process.kill()
    server.wait_for("north left")
    again("north")
    server.wait_for("back: north: 9 examples")
    last = server.said.rindex("back: north")
    server.wait_for_since(last, "  north: held ")
    capsys.readouterr()
    assert hfedmoe("status", "--json") == 0
    takes_part = {one["name"]: one["takes_part"] for one in json.loads(capsys.readouterr().out)["devices"]}
    assert takes_part["north"].startswith("again from round ")
    assert takes_part["south"].startswith("left ")
    assert int(takes_part["east"].removeprefix("from round ")) > 1
    assert "warning" not in server.said
    assert hfedmoe("stop") == 0
    assert server.ended() == 0, server.said
    run = RunFolder.open(folder / "runs" / "second")
    rounds = [{row["client"]: row["status"] for row in line["clients"]} for line in run.read_rounds()[1:]]
    assert set(rounds[0]) == {0, 1}
    assert set(rounds[-1]) == {0, 2}
    assert {status for line in rounds for status in line.values()} <= {"ok", "left"}
    # A device that was killed goes on with what it remembers.
    key = json.loads((folder / "runs" / "second" / "fleet.json").read_text())["run"]
    state = RunMemory(folder / "north.device" / "memory", key).recall()
    blob = state.config_records["history"]["blob"]
    assert isinstance(blob, bytes)
    assert ClientHistory.from_tensors(load(blob), [8, 8, 8, 8]).rounds == sum(line.get(0) == "ok" for line in rounds)
    return server


@pytest.mark.slow
def test_three_devices_end_with_the_weights_of_one_process_even_if_the_server_stops_between(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = Page(HOST, free_port())
    save_tiny(tmp_path / "models" / "base")
    rows_file(tmp_path / "public.csv", "earn", "acq", "crude", rows=9)
    rows_file(tmp_path / "test.csv", "earn", "acq", "crude", rows=6)
    tracking = '[tracking]\nto = ["tensorboard"]' if is_installed("tensorboard") else ""
    settings(tmp_path, "my", f'source = "{{folder}}/public.csv"\n{tracking}')
    in_one_process(tmp_path)
    assert hfedmoe(*page.command("serve", "init")) == 0
    for name in NAMES:
        assert hfedmoe(*page.command("invite", name)) == 0
    with commands(tmp_path) as started:
        server = started.start("server", *page.command("serve", "my.toml"))
        server.wait_for("0 of 3 here, waiting for north, south, east")
        stranger = json.loads((tmp_path / "north.invite").read_text()) | {"key": new_key()}
        (tmp_path / "stranger.invite").write_text(json.dumps(stranger))
        shutil.copy("north.csv", "hospital.csv")
        refused = started.start("stranger", "join", "stranger.invite", "--data", "north.csv", "--folder", "s")
        checked = page.command("join", "north.invite")
        assert checked[-1] == "--check"
        joined = page.command("join", "north.invite")
        assert joined == checked[:-1]
        devices = [started.start("north", *joined)]
        for name, budget in zip(NAMES[1:], BUDGETS[1:], strict=True):
            swaps = {"north.invite": f"{name}.invite", "hospital.csv": f"{name}.csv", BUDGETS[0]: budget}
            devices.append(started.start(name, *[swaps.get(word, word) for word in joined]))
        assert refused.ended() == 2
        assert "does not know the key of north; ask for a new invitation" in refused.said
        capsys.readouterr()
        assert hfedmoe(*checked) == 0
        assert len(capsys.readouterr().out.splitlines()) == 6
        server.wait_for("round 1/2\n")
        assert hfedmoe(*page.command("status"), "--json") == 0
        shown = json.loads(capsys.readouterr().out)
        assert (shown["serving"]["round"], shown["serving"]["rounds"]) == (1, 2)
        assert [(one["name"], one["here"], one["rows"], one["budget"]) for one in shown["devices"]] == [
            ("north", True, 9, 32),
            ("south", True, 12, 12),
            ("east", True, 15, 32),
        ]
        assert hfedmoe(*page.command("stop")) == 0
        assert server.ended() == 0, server.said
        assert "ended after round 1; `hfedmoe serve --resume runs/first` continues" in server.said
        capsys.readouterr()
        assert hfedmoe("status") == 0
        assert "nothing is served" in capsys.readouterr().out

        again = started.start("again", *page.command("serve", "--resume"))
        assert again.ended() == 0, again.said
        assert "rounds 2 to 2, 3 clients" in again.said
        for device in devices:
            assert "round 2: step 2/2, loss " in device.said
            assert device.process.poll() is None  # it waits for the next run
        coming_and_going = who_comes_and_goes(started, dict(zip(NAMES, devices, strict=True)), tmp_path, capsys)
        assert hfedmoe(*page.command("remove", "north")) == 0
        assert page.left == []
        servers = [server.log, again.log, coming_and_going.log]
        told = "".join(file.read_text() for file in [*servers, *(tmp_path / "fleet" / "logs").iterdir()])

    ours, theirs = (RunFolder.open(tmp_path / name) for name in ("in-process", "runs/first"))
    expected, got = ours.load_checkpoint("last"), theirs.load_checkpoint("last")
    assert got.round == expected.round == 2
    assert got.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(got.tensors[name], tensor), name
    for one, other in zip(ours.read_rounds()[1:], theirs.read_rounds()[1:], strict=True):
        for mine, deployed in zip(one["clients"], other["clients"], strict=True):
            for key in ("client", "examples", "resident", "trained", "bytes_down", "first_loss", "last_loss"):
                assert mine[key] == deployed[key], key

    if tracking:  # one run for TensorBoard, although the server was started twice
        sent = [(line["round"], line["bytes_up"]) for line in theirs.read_rounds()[1:]]
        assert tensorboard_series(tmp_path / "runs" / "first", "bytes/up") == sent

    # No row of a device has left it, and no app of the server was unpacked on it.
    files = [file for file in (tmp_path / "runs").rglob("*") if file.is_file()]
    for name in NAMES:
        assert f"{name}.csv" not in told
        for row in csv.DictReader((tmp_path / f"{name}.csv").open()):
            assert row["text"] not in told
            assert not any(row["text"].encode() in file.read_bytes() for file in files)
        assert read_invitation(tmp_path / f"{name}.invite").key is not None
        assert not list((tmp_path / f"{name}.device").rglob("apps.py"))
        assert not (tmp_path / f"{name}.device" / "key").exists()
