"""Write the tables of docs/methods.md from `hfedmoe.method.methods`.

    python tools/methods_docs.py

The rest of the page is written by hand; the tables are between two comments.
"""

from pathlib import Path

from hfedmoe.report.method_list import as_markdown

TARGET = Path(__file__).parents[1] / "docs" / "methods.md"
BEGIN, END = "<!-- Written by tools/methods_docs.py: change src/hfedmoe/method/ -->", "<!-- until here -->"


def page() -> str:
    """The page with the tables as they should be."""
    text = TARGET.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{as_markdown()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
