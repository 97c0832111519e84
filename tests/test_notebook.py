"""The notebook of examples/ is well-formed, has no outputs, and its cells run from rows to report."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

NOTEBOOK = Path(__file__).parents[1] / "examples" / "first_run.ipynb"


def cells(kind: str) -> list[str]:
    tree = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in tree["cells"] if cell["cell_type"] == kind]


def test_it_is_a_notebook_without_outputs():
    tree = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (tree["nbformat"], tree["nbformat_minor"]) == (4, 5)
    assert tree.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    ids = [cell["id"] for cell in tree["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in tree["cells"]:
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"])
        assert cell["cell_type"] in ("markdown", "code")
        own = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert cell.keys() == {"cell_type", "id", "metadata", "source"} | own
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        if own:
            assert (cell["execution_count"], cell["outputs"]) == (None, [])


def test_its_links_lead_somewhere():
    for text in cells("markdown"):
        for target in re.findall(r"\]\(([^)#]+)", text):
            assert (NOTEBOOK.parent / target).exists(), target


def test_its_cells_run(tmp_path):
    code = "\n".join(cells("code"))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:hfedmoe", "-c", code],
        cwd=tmp_path,
        env=clean,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shares = [float(found) for found in re.findall(r"round \d, all: accuracy (.*)% of", done.stdout)]
    assert len(shares) == 2  # before and after; the watched rows have lines of their own
    assert shares[-1] > shares[0] + 20
    assert "north: held 8 experts" in done.stdout
    assert "west: held 32 experts" in done.stdout
    assert re.search(r"wheat farmers crop -> \{'grain'", done.stdout)
    assert (tmp_path / "sites-model" / "config.json").is_file()
    assert (tmp_path / done.stdout.splitlines()[-1]).read_text(encoding="utf-8").startswith("<!")
