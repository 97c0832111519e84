"""Every config of the README and of the docs is valid, and runs as it stands where its files are there.

With a tiny model in place of the one that is named, and no run longer than it must be.
"""

import tomllib
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import hfedmoe
from hfedmoe.config import config_from_tree
from hfedmoe.models.packaged import smollm2_folder
from hfedmoe.report.page import page as pages
from tests.commands import hfedmoe as run_command
from tests.pages.blocks import EVERY, ROOT, Block
from tests.pages.test_run import MY_TOML, SMALL, rows

CONFIGS = [block for block in EVERY if block.language == "toml"]
OURS = [block for block in CONFIGS if not block.needs and not block.run_by]
STAND_IN = ["--set", "model.name=model", "--set", "model.upcycle.experts=8"]
SHORT = [*SMALL, "--set", "data.train_rows=480", "--set", "data.test_rows=8", "--set", "evaluation.watch_rows=2"]


PIQA = '{"goal": "boil water", "sol1": "heat it", "sol2": "freeze it", "label": 0}\n'


def shown_row(page: str, number: int) -> str:
    """The first row of the JSON block with this number of a page."""
    shown = (ROOT / page).read_text(encoding="utf-8").split("```json\n")[number]
    return shown.splitlines(keepends=True)[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the configs name, and a tiny model."""
    folder = tmp_path_factory.mktemp("configs")
    rows(folder / "reviews.csv", 400)
    for name in ("north", "south", "west"):
        rows(folder / f"{name}.jsonl", 60, "body", "topic")
    (folder / "north.csv").write_text("text,label\n" + "late again,delivery\nmoney back,refund\nhello,other\n" * 200)
    (folder / "questions.jsonl").write_text(shown_row("README.md", 1) * 160, encoding="utf-8")
    (folder / "rows.jsonl").write_text(PIQA * 160)
    (folder / "chats.jsonl").write_text(shown_row("docs/data.md", 2) * 160, encoding="utf-8")
    (folder / "my.toml").write_text(MY_TOML)
    save_model(folder / "model")
    return folder


def save_model(folder: Path) -> None:
    """A tiny random Llama, which becomes a Mixture of Experts, with the tokenizer and chat template of SmolLM2."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("block", CONFIGS, ids=str)
def test_configs_are_valid(block: Block) -> None:
    config_from_tree(tomllib.loads("\n".join(block.text)), str(block))


@pytest.mark.parametrize("block", OURS, ids=str)
def test_configs_run(block: Block, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    config = tmp_path / "my.toml"
    config.write_text("\n".join(block.text), encoding="utf-8")
    assert run_command("run", config, "--out", tmp_path / "run", *STAND_IN, *SHORT) == 0


def test_the_program_of_the_readme_runs(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`my.toml` is the one of `tests/pages/test_run.py`; the report is left out, which takes as long as the run."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(pages, "write_report", lambda runs: runs[0] / "report.html")
    (program,) = [block for block in EVERY if block.language == "python" and block.page == "README.md"]
    names: dict[str, object] = {}
    exec("\n".join(program.text), names)
    assert isinstance(names["run"], hfedmoe.Run)
    assert capsys.readouterr().out.rstrip().endswith("report.html")
