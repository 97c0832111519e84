"""The console, TOML and Python blocks of the pages, and what each of them says about who runs it.

Without a mark, a console block is run by `tests/pages/test_run.py`, a config (TOML) by `tests/pages/test_configs.py`.
A program (Python) always has one. It is a comment on the line before a block, or on the first line of a page for all
its blocks, and says what the block needs, so that it is not run, or which test runs it:

    <!-- needs: a download -->
    <!-- run by: tests/fleet/test_fleet.py::test_three_devices -->

The commands and configs of every block are parsed, whatever its mark.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
_MARK = re.compile(r"<!-- (needs|run by): (.+) -->")
_PROMPT = re.compile(r"^\w*\$ ")


LANGUAGES = ("console", "toml", "python")


@dataclass(frozen=True)
class Block:
    """A block of a page."""

    page: str
    """Its path from the root of the repository."""
    line: int
    """The number of the line on which it begins."""
    language: str
    """One of `LANGUAGES`."""
    text: tuple[str, ...]
    needs: str = ""
    """What it takes to run it; empty: nothing special."""
    run_by: str = ""
    """The test that runs it, `file::function`; empty: one of `tests/pages`, unless it needs something."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """Its commands as words, without comments; lines that end with a backslash are joined."""
        lines = iter(self.text)
        found = []
        for line in lines:
            if not _PROMPT.match(line):
                continue
            while line.endswith("\\"):
                line = line[:-1] + next(lines)
            found.append(shlex.split(_PROMPT.sub("", line), comments=True))
        return found

    @property
    def shown(self) -> list[str]:
        """What it shows of the output: its lines without a prompt."""
        return [line for line in self.text if not _PROMPT.match(line)]


def blocks_of(page: str, text: str | None = None) -> list[Block]:
    """The blocks of a page in one of `LANGUAGES`; `text` stands in for its content."""
    lines = (text if text is not None else (ROOT / page).read_text(encoding="utf-8")).splitlines()
    of_page = _MARK.fullmatch(lines[0]) if lines else None
    found, fence, begins = [], "", 0
    for number, line in enumerate(lines):
        if not fence and (opened := re.match(r"(`{3,})(.*)", line)):
            fence, begins, language = opened[1], number, opened[2].strip()
        elif fence and line.strip() == fence:
            inside = tuple(lines[begins + 1 : number])
            if any(_PROMPT.match(one) for one in inside):
                language = "console"
            if language in LANGUAGES:
                mark = (_MARK.fullmatch(lines[begins - 1]) if begins else None) or of_page
                says = {mark[1].replace(" ", "_"): mark[2]} if mark else {}
                found.append(Block(page, begins + 1, language, inside, **says))
            fence = ""
    return found


EVERY = [block for page in PAGES for block in blocks_of(page)]
"""All of them."""
BLOCKS = [block for block in EVERY if block.language == "console"]
"""Those with commands."""


def python_file(page: str, name: str) -> str:
    """The Python block of a page whose first line is the comment `# name`."""
    text = (ROOT / page).read_text(encoding="utf-8")
    (code,) = re.findall(rf"^```python\n(# {re.escape(name)}\n.*?)^```", text, re.MULTILINE | re.DOTALL)
    return str(code)
