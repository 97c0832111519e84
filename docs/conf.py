"""The documentation as a site: `make docs` writes it to build/docs."""

import re
from importlib.metadata import version as installed
from typing import Any

project = "hfedmoe"
author = "the hfedmoe authors"
release = version = installed("hfedmoe")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
# Lexers of consoles with prompts of several machines, and of formats that are shown as they are.
suppress_warnings = ["misc.highlighting_failure"]

html_theme = "furo"
html_title = f"hfedmoe {release}"
html_show_sourcelink = False
copybutton_prompt_text = r"(?:server|device)?\$ "
copybutton_prompt_is_regexp = True
copybutton_only_copy_prompt_lines = True

linkcheck_timeout = 20  # seconds for one page; `make links` asks for them, and no test does
linkcheck_ignore = [r"https?://(localhost|127\.)"]

default_role = "code"  # docstrings write names as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True}
napoleon_use_rtype = False


def _of_the_repository(app: Any, name: str, source: list[str]) -> None:
    """A link out of this folder works on the repository's pages; the site has no page for it and names the file."""
    source[0] = re.sub(r"\[([^\]]+)\]\(\.\./([^)#]+)[^)]*\)", r"\1 (`\2` in the repository)", source[0])


def _bars(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Bars in docstrings are sizes of sets, as |D_c|; to Sphinx they would be substitutions."""
    lines[:] = [line.replace("|", "\\|") for line in lines]


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _of_the_repository)
    app.connect("autodoc-process-docstring", _bars)
