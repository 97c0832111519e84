"""Blocks without a mark are run, page by page, in a folder with what the pages speak of and with the model `tiny`."""

import io
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from tests.commands import hfedmoe
from tests.pages.blocks import BLOCKS, ROOT
from tests.pages.commands import context_of

OURS = [block for block in BLOCKS if not block.needs and not block.run_by]
SMALL = ["--set", "federation.rounds=1", "--set", "train.steps=1", "--set", "threads=1"]
"""What makes a run short."""
MY_TOML = """
threads = 1
[model]
name = "tiny"
[data]
source = "reviews.csv"
template = "Review: {text}\\nSentiment:"
test_share = 0.2
max_tokens = 16
labels = { spam = "loss", ham = "profit" }
[partition]
scheme = "iid"
[clients]
count = 4
[federation]
rounds = 1
[train]
steps = 1
[evaluation]
watch_rows = 4
"""
RUN = "runs/2026-11-22-r8-hfedmoe"
"""The run that pages speak of."""


def rows(path: Path, number: int, text: str = "text", label: str = "label") -> None:
    """A file of short messages, every other one spam."""
    words = ("profit", "share", "bank", "oil", "dollar", "trade", "ship", "grain")
    found = [{text: f"{words[i % 8]} {words[3 * i % 7]} {i}", label: ("spam", "ham")[i % 2]} for i in range(number)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
    else:
        path.write_text(f"{text},{label}\n" + "".join(f"{row[text]},{row[label]}\n" for row in found))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages speak of: rows, a config, runs and an export."""
    folder = tmp_path_factory.mktemp("pages")
    for name in ("reviews.csv", "north.csv", "north.jsonl", "south.jsonl", "new.csv", "new.jsonl"):
        rows(folder / name, 240)
    rows(folder / "notes.csv", 240, "note", "ward")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "my.toml").write_text(MY_TOML)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert hfedmoe("run", "my.toml", "--out", RUN) == 0
        for copy in ("runs/first", "runs/second"):
            shutil.copytree(RUN, copy)
        assert hfedmoe("export", RUN, "out") == 0
    return folder


def make_way(words: list[str]) -> None:
    """Remove what an earlier command of the page wrote to the same place: they are alternatives."""
    if words[0] in ("init", "export"):
        out = Path(context_of(words).params["out"])
        shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
    if words[0] == "predict":
        for file in Path().glob("*.predicted.*"):
            file.unlink()


def run_here(words: list[str]) -> None:
    """Run a command of a page in this process, with the model `tiny`, and no run longer than it must be."""
    program, *words = words
    if program == "python":
        runpy.run_path(words[0], run_name="__main__")
        return
    assert program == "hfedmoe", f"{program}: mark the block with what it needs"
    words = ["tiny" if word == "smollm2-domains" else word for word in words]
    make_way(words)
    assert hfedmoe(*words, *(SMALL if words[0] == "run" else [])) == 0, words


@pytest.mark.parametrize("page", sorted({block.page for block in OURS}))
def test_commands_run(page: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    shutil.copytree(place, here, symlinks=True)
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    for block in OURS:
        if block.page == page:
            for words in block.commands:
                run_here(words)
