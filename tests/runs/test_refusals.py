"""A wrong path is refused before anything heavy is imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hfedmoe.runs.folder import RunFolder
from tests.federation import tiny_config

PROGRAM = """
import contextlib, io, json, sys
from hfedmoe import cli
for command in json.loads(sys.argv[1]):
    told = io.StringIO()
    code = None
    with contextlib.redirect_stderr(told):
        try:
            cli.main(command.split())
        except SystemExit as stopped:
            code = stopped.code
    heavy = {"torch", "transformers", "flwr", "pandas", "datasets", "peft", "rich"} & sys.modules.keys()
    print(json.dumps([command, code, told.getvalue(), sorted(heavy)]))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that has a checkpoint of round 1, and one whose config was cut off."""
    place = tmp_path_factory.mktemp("runs")
    with RunFolder.create(place / "whole", tiny_config()) as run:
        run.save_checkpoint(1, {"a": torch.ones(2)}, {})
    (place / "cut").mkdir()
    text = (place / "whole" / "config.toml").read_text()
    (place / "cut" / "config.toml").write_text(text[: len(text) // 2])
    (place / "empty").mkdir()
    (place / "torn").mkdir()
    (place / "torn" / "hfedmoe.json").write_text("{")
    (place / "notes.txt").write_text("mine")
    (place / "rows.csv").write_text("text,label\nsome words,a\n")
    (place / "dense").mkdir()
    (place / "dense" / "config.json").write_text('{"model_type": "mistral"}')
    (place / "gone.toml").write_text('[data]\nsource = "gone.csv"\n')
    return place


WRONG_RUNS = [
    ("run tiny --out whole", "already has a run"),
    ("export whole whole/out", "in the run's own folder"),
    ("export whole out --as none", "--as none"),
    ("export whole out --checkpoint 7", "no checkpoint of round 7"),
    ("evaluate whole --checkpoint 7", "no checkpoint of round 7"),
    ("resume cut", "cut"),
    ("evaluate cut", "cut"),
    ("export cut out", "cut"),
    ("report cut", "cut"),
    ("report empty", "not a run folder"),
    ("watch cut", "cut"),
    ("watch notes.txt", "no such run folder"),
    ("resume empty", "not a run folder"),
    ("predict whole rows.csv --checkpoint 7", "no checkpoint of round 7"),
    ("predict torn rows.csv", "hfedmoe.json: is damaged"),
    ("predict empty rows.csv", "neither a run folder"),
    ("predict whole gone.csv", "gone.csv: no such file"),
    ("chat cut", "cut"),
    ("chat empty --text a", "neither a run folder"),
    ("chat torn --text a", "hfedmoe.json: is damaged"),
    ("chat whole --text a --checkpoint 7", "no checkpoint of round 7"),
    ("evaluate empty", "neither a run folder"),
    ("evaluate notes.txt", "is a file and no model"),
    ("evaluate tiny --config gone.toml", "gone.csv: no such file"),
    ("evaluate tiny --task none", "not a known data set"),
    ("inspect notes.txt", "is a file and no model"),
    ("compare tiny --seeds few", "--seeds few"),
    ("compare tiny --out notes.txt", "is a file"),
    ("compare gone.toml", "gone.csv: no such file"),
    ("run tiny --set data.source=empty", "was not written by datasets.save_to_disk"),
    ("run gone.toml --set model.name=smollm2", "set model.upcycle = { experts = 8, top_k = 2 }, or another model.name"),
    ("run gone.toml --set model.name=dense", "mistral has no Mixture-of-Experts layers; set model.upcycle"),
    ("plan --model dense", "mistral has no Mixture-of-Experts layers; set model.upcycle"),
    ("init notes.txt", 'unknown format ".txt"'),
    ("init rows.csv --out empty", "is a folder"),
]
WRONG_PATHS = [
    "run none.toml",
    "run tiny --set data.source=./none.csv",
    "run tiny --set model.name=./none",
    "plan none.toml",
    "plan --model ./none",
    "resume none",
    "evaluate ./none",
    "evaluate runs/none",
    "evaluate tiny --rows none.csv",
    "export none out",
    "inspect ./none",
    "upcycle ./none out",
    "init none.csv",
    "predict none rows.csv",
    "chat none",
    "watch none",
    "report none",
    "compare none.toml",
    "compare tiny --from none",
    "evaluate tiny --config none.toml",
]
OF_A_FLEET = [
    "serve gone.toml",
    "serve --resume none",
    "join rows.csv --data rows.csv",
]
WRONG_ON_DEVICES = [
    ("join none.invite --data rows.csv", "none.invite: no such invitation"),
    ("join rows.csv --data gone.csv", "--data gone.csv: no such file"),
    ("join rows.csv --data rows.csv --key none", "--key none: no such file"),
]
ON_NO_HUB = [
    ("inspect nothing", "no folder has this name, and it is not in the cache, and the hub cannot be reached"),
    ("run tiny --set model.name=owner/nothing", "or one of smollm2, smollm2-domains, tiny"),
    ("init rows.csv --model a:b", "it is no hub id"),
    ("plan --model owner/nothing", "name a folder, a hub id (owner/name)"),
    ("evaluate owner/nothing", "model.name = owner/nothing"),
]


def test_wrong_runs_are_refused_at_once(finished: Path) -> None:
    found = ended(finished, [command for command, _ in WRONG_RUNS])
    for (command, reason), (line, heavy) in zip(WRONG_RUNS, found, strict=True):
        assert reason in line, (command, line)
        assert heavy == [], command


def test_wrong_paths_are_refused_at_once(tmp_path: Path) -> None:
    for command, (line, heavy) in zip(WRONG_PATHS, ended(tmp_path, WRONG_PATHS), strict=True):
        assert "none" in line, (command, line)
        assert heavy == [], command


def test_wrong_paths_of_a_device_are_refused_before_flower_or_a_configuration_is_read(finished: Path) -> None:
    found = ended(finished, [command for command, _ in WRONG_ON_DEVICES])
    for (command, reason), (line, heavy) in zip(WRONG_ON_DEVICES, found, strict=True):
        assert reason in line, (command, line)
        assert heavy == [], command


def test_a_model_that_no_hub_can_give_is_refused_without_torch(finished: Path) -> None:
    found = ended(finished, [command for command, _ in ON_NO_HUB])
    for (command, reason), (line, heavy) in zip(ON_NO_HUB, found, strict=True):
        assert reason in line, (command, line)
        assert not {"torch", "transformers"} & set(heavy), command


def test_commands_of_a_fleet_refuse_without_a_model(finished: Path) -> None:
    for command, (_, heavy) in zip(OF_A_FLEET, ended(finished, OF_A_FLEET), strict=True):
        assert not {"torch", "transformers"} & set(heavy), command


def ended(place: Path, commands: list[str]) -> list[tuple[str, list[str]]]:
    """What each command says, and what it or one before it has imported of what is heavy; in a process of their own.

    All must end with one line and exit code 2.
    """
    asked = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    done = subprocess.run(asked, cwd=place, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [command for command, *_ in found] == commands, done.stderr
    for command, code, told, _ in found:
        assert (code, told.count("\n"), told[:7]) == (2, 1, "error: "), (command, told)
    return [(told, heavy) for _, _, told, heavy in found]
