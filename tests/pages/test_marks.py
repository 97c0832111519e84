"""A mark on a block says the truth: the test that it names exists and reads that page."""

import re
from pathlib import Path

import pytest

from tests.pages.blocks import EVERY, PAGES, ROOT, Block, blocks_of


@pytest.mark.parametrize("block", [block for block in EVERY if block.run_by], ids=str)
def test_a_test_that_runs_a_block_exists_and_reads_its_page(block: Block) -> None:
    file, _, name = block.run_by.partition("::")
    source = (ROOT / file).read_text(encoding="utf-8")
    assert re.search(rf"^def {re.escape(name)}\(", source, re.MULTILINE), f"{block}: no {block.run_by}"
    assert Path(block.page).name in source, f"{block}: {file} does not read {block.page}"


def test_a_mark_belongs_to_the_block_below_it_or_to_its_page() -> None:
    one = "# Page\n\n```console\n$ one  # why\nshown\n```\n"
    two = "<!-- run by: a.py::b -->\n```console\n$ two \\\n  2\n```\n"
    first, second = blocks_of("page.md", f"<!-- needs: a GPU -->\n{one}\n{two}")
    assert (first.line, first.needs, first.run_by, first.commands) == (4, "a GPU", "", [["one"]])
    assert (second.line, second.needs, second.run_by, second.commands) == (10, "", "a.py::b", [["two", "2"]])
    program, config = blocks_of(
        "page.md", "```python\nrun()\n```\n<!-- needs: a hub -->\n```toml\nseed = 1\n```\n```json\n{}\n```\n"
    )
    assert (program.language, program.line, program.text, program.needs) == ("python", 1, ("run()",), "")
    assert (config.language, config.line, config.text, config.needs) == ("toml", 5, ("seed = 1",), "a hub")
    (plain,) = blocks_of("page.md", one)
    assert (plain.needs, plain.run_by, plain.commands, plain.shown) == ("", "", [["one"]], ["shown"])


@pytest.mark.parametrize("block", [block for block in EVERY if block.language == "python"], ids=str)
def test_every_program_says_who_runs_it(block: Block) -> None:
    assert block.run_by or block.needs, f"{block}: <!-- run by: FILE::TEST -->"


@pytest.mark.parametrize("page", PAGES)
def test_every_mark_belongs_to_a_block_and_every_command_has_a_prompt(page: str) -> None:
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if re.match(r"`{3,}(sh|bash|shell)\b", line)], "write ```console and $"
    marks = {number for number, line in enumerate(lines, 1) if re.match(r"<!--\s*(needs|run)", line)}
    blocks = [block for block in EVERY if block.page == page]
    assert marks <= {1} | {block.line - 1 for block in blocks if block.needs or block.run_by}
    assert 1 not in marks or blocks
