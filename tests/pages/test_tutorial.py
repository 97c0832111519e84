"""docs/tutorial.md is run from its first command to its last, and what it shows of the screen is what is printed.

With the model `tiny`, fewer steps and other numbers: lines are compared without numbers and units.
"""

import re
import tomllib
from pathlib import Path

import pytest

from tests.commands import hfedmoe
from tests.pages.blocks import ROOT, blocks_of, python_file

PAGE = "docs/tutorial.md"
SMALL = ["--set", "federation.rounds=2", "--set", "train.steps=1", "--set", "threads=1"]


def shape(line: str) -> str:
    """A line without its numbers, units, widths and times, and without the name of the model."""
    line = re.sub(r"[\d.,:+-]*\d", "#", line.replace("smollm2-domains", "tiny"))
    line = re.sub(r"# (KiB|MiB|GiB|s)\b", "#", line)
    line = re.sub(r"takes .*|(?<=rows )\(.*\)$", "", line)  # times in words, and which labels were given
    return re.sub(r"([━─])\1*", r"\1", " ".join(line.split()))


def test_the_tutorial_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "desks"
    here.mkdir()
    monkeypatch.chdir(here)
    Path("sites.py").write_text(python_file(PAGE, "sites.py"), encoding="utf-8")
    for block in blocks_of(PAGE):
        if block.needs or block.language != "console":
            continue
        capsys.readouterr()
        for program, *words in block.commands:
            if program == "python":
                exec(compile(Path(words[0]).read_text(encoding="utf-8"), words[0], "exec"), {})
                continue
            words = ["tiny" if word == "smollm2-domains" else word for word in words]
            assert hfedmoe(*words, *(SMALL if words[0] == "run" else [])) == 0, words
        printed = {shape(line) for line in capsys.readouterr().out.splitlines()}
        for line in block.shown:
            assert line == "..." or shape(line) in printed, (line, shape(line), printed)
    (shown,) = re.findall(r"^```toml\n(.*?)^```", (ROOT / PAGE).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert tomllib.loads(shown.replace("smollm2-domains", "tiny")) == tomllib.loads(Path("my.toml").read_text())
