"""A wrong path is refused before anything heavy is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from hfedmoe import cli
try:
    cli.main(sys.argv[1:])
finally:
    heavy = {"torch", "transformers", "flwr", "pandas", "datasets", "peft", "rich"} & sys.modules.keys()
    print(sorted(heavy))
"""


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
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command.split()], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert "none" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == "[]\n"
