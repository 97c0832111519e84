"""docs/use.md: its blocks are run line by line, or say what they need.

`LLAMA_CPP=FOLDER python -m pytest tests/export/test_use.py` also runs those of llama.cpp, where FOLDER has
convert_hf_to_gguf.py and llama-cpp-python is installed.
"""

import csv
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from hfedmoe.bases import pretrain as pretraining
from hfedmoe.bases.pretrain import Recipe
from hfedmoe.bases.texts import Piece
from hfedmoe.config import DataConfig, PartitionConfig
from hfedmoe.data.tasks import load_task
from hfedmoe.models.packaged import smollm2_folder
from tests.commands import hfedmoe

PAGE = (Path(__file__).parents[2] / "docs" / "use.md").read_text(encoding="utf-8")
RUN = Path("runs/2026-11-22-r8-hfedmoe")
SHORT = ["federation.rounds=1", "train.steps=2", "data.train_rows=120", "data.test_rows=20", "clients.count=2"]
PROMPTS = [
    "News: Oil prices rose again.\nTopic:",
    "The bank said its net profit fell to 3.5 mln dlrs",
    "Café   au lait",
]

NEEDS = "Needs what the block above installs"
NOT_RUN = "Not run by the tests: "
LLAMA_CPP = os.environ.get("LLAMA_CPP", "")
"""The folder of llama.cpp's sources, with its converter."""
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None or not Path(LLAMA_CPP, "convert_hf_to_gguf.py").is_file(),
    reason="needs llama-cpp-python, and LLAMA_CPP=FOLDER with convert_hf_to_gguf.py (docs/use.md)",
)


@dataclass(frozen=True)
class Block:
    """A block of the page and the line in italics above it."""

    mark: str
    language: str
    text: str

    def run(self) -> dict[str, Any]:
        """Run it in the current folder: each command must succeed; of Python, the names that it leaves."""
        if self.language == "python":
            names: dict[str, Any] = {}
            exec(compile(self.text, "docs/use.md", "exec"), names)
            return names
        for line in self.text.splitlines():
            program, *arguments = shlex.split(line.removeprefix("$ "), comments=True)
            if program == "hfedmoe":
                assert hfedmoe(*arguments) == 0, line
            else:
                assert program == "python", line
                done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stderr
        return {}


BLOCK = re.compile(r"^(?:\*(?P<mark>[^*\n]+)\*\n\n)?```(?P<language>\w+)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)


def blocks() -> Iterator[Block]:
    for found in BLOCK.finditer(PAGE):
        yield Block(found["mark"] or "", found["language"], found["text"])


def block_with(words: str) -> Block:
    (found,) = [block for block in blocks() if words in block.text and block.mark.startswith(NEEDS)]
    return found


@torch.no_grad()
def logits(model: Any, tokens: list[int]) -> Tensor:
    return model.eval()(torch.tensor([tokens])).logits[0].float()


def test_every_block_is_run_or_says_what_it_needs() -> None:
    found = list(blocks())
    assert len(found) == PAGE.count("```") // 2
    for block in found:
        assert not block.mark or block.mark.startswith((NEEDS, NOT_RUN)), block.mark
        assert block.language in ("console", "python"), block.language
        if block.language == "console":
            assert all(line.startswith("$ ") for line in block.text.splitlines()), block.text
    for program in ("hfedmoe export", "hfedmoe predict", "hfedmoe chat", "from peft"):
        assert any(program in block.text for block in found if not block.mark), program


def test_the_blocks_without_a_mark_run_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    start(RUN)
    rows = ["Oil prices rose again.", "Wheat exports fell."]
    with Path("new.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["text"], *([row] for row in rows)])
    models = []
    for block in blocks():
        if not block.mark:
            capsys.readouterr()
            models += [names["model"] for names in [block.run()] if "model" in names]
            assert capsys.readouterr().out.strip(), block.text
    merged, adapted = models
    tokens = AutoTokenizer.from_pretrained("merged")(PROMPTS[0])["input_ids"]
    assert (logits(merged, tokens) - logits(adapted, tokens)).abs().max() <= 1e-5
    base = AutoModelForCausalLM.from_pretrained("adapter/base")
    assert (logits(merged, tokens) - logits(base, tokens)).abs().max() > 0.01  # something was trained
    with Path("new.predicted.csv").open() as stream:
        assert [row["text"] for row in csv.DictReader(stream) if row["predicted"]] == rows


# llama.cpp

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
QWEN3 = {"norm_topk_prob": True}
"""llama.cpp takes it as given, as in all published models; the default of transformers is false."""
FAMILIES: dict[str, Any] = {
    "mixtral": lambda own: MixtralConfig(**SIZES, **own, num_key_value_heads=2, num_local_experts=4),
    "olmoe": lambda own: OlmoeConfig(**SIZES, **own, num_key_value_heads=4, num_experts=4),
    "qwen3_moe": lambda own: Qwen3MoeConfig(
        **SIZES, **own, **QWEN3, num_key_value_heads=2, head_dim=16, num_experts=4, moe_intermediate_size=32
    ),
}


def start(out: Path, *settings: str) -> None:
    """A short run in `out`."""
    every = [*SHORT, *settings]
    assert hfedmoe("run", "tiny", "--out", out, *(part for value in every for part in ("--set", value))) == 0


def small(family: str, folder: Path) -> None:
    """A tiny random model with a tokenizer that the converter knows."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = FAMILIES[family]({"vocab_size": len(tokenizer), "tie_word_embeddings": False, **special})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def llama_logits(tokens: list[int]) -> Tensor:
    """Of merged.gguf."""
    from llama_cpp import Llama

    model = Llama("merged.gguf", n_ctx=512, logits_all=True, verbose=False)
    model.eval(tokens)
    return torch.tensor(model.scores[: len(tokens)].copy())


def check_equal(capsys: pytest.CaptureFixture[str]) -> None:
    """merged.gguf under llama.cpp has the tokens, the logits and the answer of the folder merged under transformers."""
    from llama_cpp import Llama

    vocabulary = Llama("merged.gguf", vocab_only=True, verbose=False)
    model, tokenizer = AutoModelForCausalLM.from_pretrained("merged").float(), AutoTokenizer.from_pretrained("merged")
    base = AutoModelForCausalLM.from_pretrained("base").float()
    for prompt in PROMPTS:
        tokens = tokenizer(prompt)["input_ids"]
        assert vocabulary.tokenize(prompt.encode(), add_bos=False) == tokens
        found, expected = llama_logits(tokens), logits(model, tokens)
        away = (found - expected).abs().max()
        assert away < (logits(base, tokens) - expected).abs().max() / 5  # what was trained is in the file
        best = expected.topk(2).values
        clear = best[:, 0] - best[:, 1] > 2 * away  # else rounding may change which token is first
        assert clear.float().mean() > 0.5
        assert torch.equal(found.argmax(1)[clear], expected.argmax(1)[clear])
    asked = tokenizer(PROMPTS[0], return_tensors="pt", return_token_type_ids=False)
    answer = model.generate(**asked, max_new_tokens=4, do_sample=False)[0, asked["input_ids"].shape[1] :]
    capsys.readouterr()
    block_with("Llama(").run()
    assert capsys.readouterr().out == tokenizer.decode(answer, skip_special_tokens=True) + "\n"


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sources where the page has them, below the current folder."""
    monkeypatch.chdir(tmp_path)
    place = Path("llama_cpp_python-0.3.36", "vendor", "llama.cpp")
    place.parent.mkdir(parents=True)
    place.symlink_to(LLAMA_CPP)


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.usefixtures("sources")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_file_under_llama_cpp_answers_as_the_merged_model(
    family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small(family, Path("base"))
    start(RUN, "model.name=base", "train.lr=3e-2", "clients.budgets=['100%']")
    assert hfedmoe("export", RUN, "merged") == 0
    block_with("gguf.py merged").run()
    check_equal(capsys)


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.usefixtures("sources")
def test_so_does_that_of_a_base_whose_tokenizer_the_converter_does_not_know(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = load_task(DataConfig(), PartitionConfig(), seed=0)
    texts = [Piece(row.text, task.labels[row.answer], task.labels[row.answer]) for row in task.train[:200]]
    monkeypatch.setattr(pretraining, "pieces", lambda split, words: texts)
    recipe = Recipe(vocabulary=400, hidden=64, intermediate=32, layers=2, heads=2, experts=8, steps=6, warmup=2)
    pretraining.pretrain(Path("base"), recipe, lambda *progress: None)
    start(RUN, "model.name=base", "train.lr=3e-2", "clients.budgets=['100%']")
    assert hfedmoe("export", RUN, "merged") == 0
    with pytest.raises(AssertionError, match="pre-tokenizer was not recognized"):
        block_with("gguf.py merged").run()
    Path("convert.py").write_text(block_with("runpy").text)
    Block("", "console", "$ python convert.py\n").run()  # in a process of its own: it changes the converter
    check_equal(capsys)
