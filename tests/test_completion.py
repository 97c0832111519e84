"""Tab completes commands and options, at once and without anything heavy; `--show-completion` prints the script."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from hfedmoe.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stopped:
    code = stopped.code
heavy = {"torch", "transformers", "flwr", "rich", "pydantic"} & sys.modules.keys()
sys.exit(", ".join(heavy) or code)
"""


def answered(*arguments: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("hfedmoe ex", ["export"]),
        ("hfedmoe base ch", ["check"]),
        ("hfedmoe export --ch", ["--checkpoint"]),
    ],
)
def test_words_are_completed(words, expected):
    number = str(len(words.split()) - 1)
    assert answered(_HFEDMOE_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=number).split() == expected


def test_the_script_is_that_of_the_shell():
    script = answered("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "_HFEDMOE_COMPLETE=complete_bash" in script
    assert script.rstrip().endswith("hfedmoe")
