"""A wrong path is refused before anything heavy is imported."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hfedmoe.runs.folder import RunFolder
from tests.federation import tiny_config

PROGRAM = """
import sys
from hfedmoe import cli
try:
    cli.main(sys.argv[1:])
finally:
    heavy = {"torch", "transformers", "flwr", "pandas", "datasets", "peft", "rich"} & sys.modules.keys()
    print(sorted(heavy))
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
    return place


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("run tiny --out whole", "already has a run"),
        ("export whole whole/out", "in the run's own folder"),
        ("export whole out --as none", "--as none"),
        ("export whole out --checkpoint 7", "no checkpoint of round 7"),
        ("evaluate whole --checkpoint 7", "no checkpoint of round 7"),
        ("resume cut", "cut"),
        ("evaluate cut", "cut"),
        ("export cut out", "cut"),
    ],
)
def test_wrong_runs_are_refused_at_once(finished: Path, command: str, reason: str) -> None:
    refused(finished, command, reason)


@pytest.mark.parametrize(
    "command",
    [
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
    ],
)
def test_wrong_paths_are_refused_at_once(tmp_path: Path, command: str) -> None:
    refused(tmp_path, command, "none")


def refused(place: Path, command: str, reason: str) -> None:
    """The command ends with one line and exit code 2, and has imported nothing heavy."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command.split()], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == "[]\n"
