"""A device that goes on training for itself after the last round, as processes with TLS and keys."""

import json
from pathlib import Path

import pytest

from hfedmoe.runs.folder import RunFolder
from tests.deployment.nodes import rows_file
from tests.fleet.places import HOST, hfedmoe, new_fleet, save_tiny
from tests.fleet.processes import commands

ROWS, STEPS = 120, 2
CONFIG = """
threads = 1
name = "tuned"
[model]
name = "{folder}/base"
[clients]
count = 1
budgets = ["50%"]
[federation]
rounds = 1
min_clients = 1
[train]
steps = 2
batch_size = 4
[evaluation]
watch_rows = 0
tune_steps = {steps}
[method]
bootstrap = "stream"
[data]
source = "{folder}/public.csv"
test = "{folder}/public.csv"
"""


@pytest.mark.slow
def test_what_a_device_trains_for_itself_stays_there_and_becomes_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base")
    rows_file(tmp_path / "public.csv", "earn", "acq", rows=12)
    rows_file(tmp_path / "own.csv", "earn", "acq", rows=ROWS)
    (tmp_path / "my.toml").write_text(CONFIG.format(folder=tmp_path, steps=STEPS))
    new_fleet(tmp_path, "north")
    with commands(tmp_path) as started:
        options = ["--data", "own.csv", "--budget", "50%", "--model", "base"]
        device = started.start("north", "join", "north.invite", *options)
        server = started.start("server", "serve", "my.toml", "--out", "run", "--listen", HOST)
        assert server.ended() == 0, server.said + device.said
        told = server.said
    assert f"after the last round: {STEPS} steps more, for this device itself" in device.said
    (site,) = RunFolder.open(tmp_path / "run").read_rounds()[-1]["sites"]
    assert (site["name"], site["own_rows"], site["tuning"]["steps"]) == ("north", ROWS // 10, STEPS)
    assert site["tuning"]["after"]["loss"] != site["tuning"]["before"]["loss"]
    assert f"and after {STEPS} steps more for itself" in told

    # It is on the device's disk alone; with the run folder it becomes that device's own model.
    assert not (tmp_path / "run" / "tuned").exists()
    (own,) = (tmp_path / "north.device" / "tuned").iterdir()
    capsys.readouterr()
    assert hfedmoe("export", "run", "mine", "--as", "client", "--client", "0", "--tuned", own) == 0
    assert f"trained {STEPS} steps further for itself" in capsys.readouterr().out
    assert json.loads((tmp_path / "mine" / "experts.json").read_text())["tuned_steps"] == STEPS
