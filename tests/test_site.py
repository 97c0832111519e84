"""The documentation as a site: it builds without a warning, so no link inside it leads nowhere."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_site_builds_without_warnings_and_has_every_page(tmp_path: Path) -> None:
    command = ["--quiet", "--fail-on-warning", "--keep-going", "--builder", "html"]
    folders = ["--doctree-dir", str(tmp_path / "trees"), str(ROOT / "docs"), str(tmp_path / "site")]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *command, *folders], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    pages = {path.stem for path in (tmp_path / "site").glob("*.html")}
    assert {path.stem for path in ROOT.glob("docs/*.md")} <= pages
    api = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    for name in ("hfedmoe.config.run.RunConfig", "hfedmoe.errors.UserError", "hfedmoe.method.row.Method"):
        assert f'id="{name}"' in api
    assert "Equation" in api or "equation" in api
    assert "../" not in (tmp_path / "site" / "results.html").read_text(encoding="utf-8").split("<article")[1]
