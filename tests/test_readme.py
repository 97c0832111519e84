"""What the README promises is there: its make targets, its commands and options, its configs, its links."""

import json
import re
from pathlib import Path

import pytest
import typer.main

from hfedmoe.cli import app
from hfedmoe.models.packaged import INSTALL

ROOT = Path(__file__).parents[1]
MODEL = INSTALL.split()[-1]
PAPERS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_it_opens_with_the_two_commands():
    first = [line.split("#")[0].strip() for line in blocks("console")[0].splitlines()]
    assert first == ["$ make demo", "$ make test"]
    assert README.index("make demo") < README.index("**What it is.**")


def test_the_first_screen_says_what_it_is_for_whom_if_it_is_safe_and_which_model():
    screen = README[: README.index("**What the demo shows.**")]
    order = ["make demo", "pip install hfedmoe", "hfedmoe run tiny", "**What it is.**", "**For whom.**"]
    order += ["**Is it safe for private texts?**", "adds noise", "#who-can-do-what", "**Which model?**"]
    places = [screen.index(words) for words in order]
    assert places == sorted(places)
    assert screen.count("\n") <= 45
    for words in ("*Mixture of Experts* (MoE)", "the *experts*", "a *router*"):
        assert words in screen
    assert README.index("macro-F1, in which") == README.index("macro-F1")


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_both_ways_to_install_are_shown_and_a_run_of_seconds_comes_first(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "$ make demo" in text
    (block,) = [
        block for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL) if "pip install hfedmoe" in block
    ]
    commands = [line.split("#")[0].strip("$ \n") for line in block.splitlines()]
    assert commands == ["pip install hfedmoe", "hfedmoe run tiny", INSTALL, "hfedmoe run"]
    assert MODEL in (ROOT / "Makefile").read_text()


def headings(page: str) -> set[str]:
    """The anchors of a page, as GitHub and the site make them."""
    lines = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in lines}


def test_make_targets_exist():
    targets = re.findall(r"^\.PHONY: (\w+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake (demo|test|setup|clean|\w+ing)\b", README)) <= set(targets)
    assert {"demo", "test", "setup", "clean", "help"} <= set(targets)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("paper", PAPERS)
def test_commands_and_options_in_the_text_exist(paper):
    """Those in blocks are parsed by `tests/pages`."""
    text = (ROOT / paper).read_text(encoding="utf-8")
    for line in re.findall(r"`(hfedmoe [^`\n]*)", text):
        words = line.split()
        if words[1:2] == ["COMMAND"] or words[1].startswith("--"):
            continue
        assert words[1] in COMMANDS, line
        parts = getattr(COMMANDS[words[1]], "commands", {"": COMMANDS[words[1]]}).values()  # of a group, any command
        params = [parameter for part in parts for parameter in part.params]
        known = {"--help"}.union(*([*one.opts, *one.secondary_opts] for one in params))
        assert {word for word in words if word.startswith("--")} <= known, line


def test_every_command_is_in_the_table():
    assert {name for name in COMMANDS if f"| `hfedmoe {name} " in README or f"| `hfedmoe {name}`" in README} == set(
        COMMANDS
    )


@pytest.mark.parametrize("block", blocks("json"))
def test_json_blocks_are_rows(block):
    rows = [json.loads(line) for line in block.splitlines()]
    assert all({"prompt", "choices", "answer"} <= row.keys() for row in rows)


@pytest.mark.parametrize("paper", PAPERS)
def test_links_lead_somewhere(paper):
    text = (ROOT / paper).read_text(encoding="utf-8")
    for target, _, anchor in re.findall(r"\]\(([^)#]*)(#([^)]*))?\)", text):
        if not target.startswith("http"):
            file = (ROOT / paper).parent / target if target else ROOT / paper
            assert file.exists(), target
            assert not anchor or anchor in headings(str(file)), f"{target}#{anchor}"
