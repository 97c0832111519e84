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
from hfedmoe.simulation import assemble
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
keep_checkpoints = 60
[model]
name = "{folder}/models/base"
[clients]
count = 3
budgets = ["4GiB", 12, "100%"]
[federation]
rounds = 60
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
    """Three rounds of the same federation in this process; a device's file gets its client's rows in their order."""
    for number in range(3):
        own = rows_file(folder / f"own{number}.csv", "earn", "acq", "crude", rows=9 + 3 * number)
        own.write_text(own.read_text().replace(",", " grain ship grain,").replace("text grain ship grain,", "text,"))
    files = ", ".join(f'"{{folder}}/own{number}.csv"' for number in range(3))
    config = load_config(settings(folder, "in-process", f"clients = [{files}]"))
    ready = prepare(config, Silent())
    parts = partition(ready.task, config.partition, 3, config.seed)
    with RunFolder.create(folder / "in-process", config) as kept:
        kept.settle(ready.settled)
        simulation = assemble(ready, parts, kept, Silent())
        simulation.server.ends_early = lambda: simulation.server.round == 3
        simulation.run()
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


def who_comes_and_goes(started: Commands, server: Command, devices: dict[str, Command]) -> None:
    """After round 3, west is invited and joins, south is stopped, and north is killed and started again."""
    assert hfedmoe("invite", "west") == 0
    rows_file(Path("west.csv"), "earn", "crude", rows=18)
    swaps = {"north.invite": "west.invite", "hospital.csv": "west.csv"}
    started.start("west", *[swaps.get(str(word), word) for word in devices["north"].arguments])
    devices["north"].process.kill()
    server.wait_for("north left")
    started.start("north-again", *devices["north"].arguments)
    devices["south"].process.terminate()
    assert devices["south"].ended() == 0
    server.wait_for("south left")
    for back in ("back: north: 9 examples", "joined: west: 18 examples"):
        server.wait_for(back)
    for name in ("north", "west"):  # in a round in which both are here
        server.wait_for_since(max(map(server.said.rindex, ("back: north", "joined: west"))), f"  {name}: held ")
    assert "warning" not in server.said


def check_who_came_and_went(run: RunFolder, takes_part: dict[str, str]) -> None:
    """What `hfedmoe status` said before the end, and what is written down."""
    assert takes_part["north"].startswith("again from round ")
    assert takes_part["south"].startswith("left ")
    assert takes_part["east"] == "from round 2"  # of this process of the server
    assert int(takes_part["west"].removeprefix("from round ")) > 3
    rounds = [{row["client"]: row["status"] for row in line["clients"]} for line in run.read_rounds()[1:]]
    assert rounds[1] == rounds[2] == {0: "ok", 1: "ok", 2: "ok"}
    assert rounds[-1] == {0: "ok", 2: "ok", 3: "ok"}
    assert {status for line in rounds for status in line.values()} <= {"ok", "left"}
    # A device that was killed goes on with what it remembers.
    key = json.loads((run.path / "fleet.json").read_text())["run"]
    blob = RunMemory(Path("north.device") / "memory", key).recall().config_records["history"]["blob"]
    assert isinstance(blob, bytes)
    assert ClientHistory.from_tensors(load(blob), [8] * 4).rounds == sum(line.get(0) == "ok" for line in rounds)


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
    assert hfedmoe(*page.command("invite", NAMES[0])) == 0
    with commands(tmp_path) as started:
        stranger = json.loads((tmp_path / "north.invite").read_text()) | {"key": new_key()}
        (tmp_path / "stranger.invite").write_text(json.dumps(stranger))
        shutil.copy("north.csv", "hospital.csv")
        checked = page.command("join", "north.invite")
        assert checked[-1] == "--check"
        joined = page.command("join", "north.invite")
        assert joined == checked[:-1]
        devices = [started.start("north", *joined)]
        capsys.readouterr()
        assert hfedmoe(*page.command("serve", "--check")) == 0
        row, last = capsys.readouterr().out.splitlines()[-2:]
        assert row.split() == ["north", "yes", "yes", "yes", "9", "yes", "32", "of", "32", "-"]
        assert last == "1 of 1 devices fit"
        assert "the server checks its devices" in devices[0].said
        for name in NAMES[1:]:
            assert hfedmoe(*page.command("invite", name)) == 0
        server = started.start("server", *page.command("serve", "my.toml"))
        server.wait_for("of 3 here, waiting for ")
        for name, budget in zip(NAMES[1:], BUDGETS[1:], strict=True):
            own = f"models/{name}"  # a checkpoint of its own
            shutil.copytree("models/base", own)
            swaps = {"north.invite": f"{name}.invite", "hospital.csv": f"{name}.csv", BUDGETS[0]: budget}
            swaps["models/base"] = own
            devices.append(started.start(name, *[swaps.get(word, word) for word in joined]))
        refused = started.start("stranger", "join", "stranger.invite", "--data", "north.csv", "--folder", "s")
        assert refused.ended() == 2
        assert "does not know the key of north; ask for a new invitation" in refused.said
        capsys.readouterr()
        assert hfedmoe(*checked) == 0
        assert len(capsys.readouterr().out.splitlines()) == 6
        server.wait_for("round 1/60\n")
        assert hfedmoe(*page.command("status"), "--json") == 0
        shown = json.loads(capsys.readouterr().out)
        assert (shown["serving"]["round"], shown["serving"]["rounds"]) == (1, 60)
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
        again.wait_for("rounds 2 to 60, 3 clients")
        again.wait_for("round 3/60 done")
        for device in devices:
            device.wait_for("round 3: step 2/2, loss ")
        who_comes_and_goes(started, again, dict(zip(NAMES, devices, strict=True)))
        capsys.readouterr()
        assert hfedmoe("status", "--json") == 0
        takes_part = {one["name"]: one["takes_part"] for one in json.loads(capsys.readouterr().out)["devices"]}
        assert hfedmoe("stop") == 0
        assert again.ended() == 0, again.said
        assert devices[2].process.poll() is None  # it waits for the next run
        assert hfedmoe(*page.command("remove", "north")) == 0
        assert page.left == []
        told = "".join(file.read_text() for file in [server.log, again.log, *(tmp_path / "fleet" / "logs").iterdir()])

    ours, theirs = (RunFolder.open(tmp_path / name) for name in ("in-process", "runs/first"))
    check_who_came_and_went(theirs, takes_part)
    expected, got = ours.load_checkpoint(3), theirs.load_checkpoint(3)
    assert got.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(got.tensors[name], tensor), name
    for one, other in zip(ours.read_rounds()[1:], theirs.read_rounds()[1:4], strict=True):
        for mine, deployed in zip(one["clients"], other["clients"], strict=True):
            for key in ("client", "examples", "resident", "trained", "first_loss", "last_loss"):
                assert mine[key] == deployed[key], key
            if one["round"] == 1:  # a server that was started again asks for plans that it was told before
                assert mine["bytes_down"] == deployed["bytes_down"]

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
