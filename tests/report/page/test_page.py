"""The page itself: one file that needs nothing else."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from hfedmoe.config import RunConfig
from hfedmoe.errors import UserError
from hfedmoe.report.page.page import write_report
from hfedmoe.runs.folder import RunFolder
from tests.report.page.runs import entry, figures, small_run

MB = 10**6
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_a_page_holds_everything_and_nothing_of_a_text_becomes_markup(tmp_path: Path) -> None:
    path = write_report([small_run(tmp_path / "run")])
    page = path.read_text(encoding="utf-8")
    assert path == tmp_path / "run" / "report.html"
    assert len(page) < 3 * MB
    body = page[page.index("</head>\n<body>") :]
    head = page[: page.index("<script")]
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', head + body)  # no request leaves the page
    assert "alpha &lt;b&gt;" in body
    assert "75.0 %" in body
    assert "before: 25.0 %" in body
    assert "late: no answer (1)" in body
    assert "Rounds with fewer clients than asked: 2." in body
    assert "1 of 5 experts were trained by nobody" in body
    assert "an abacus" in body
    assert "hfedmoe run" in body
    assert body.count("data:text/csv;base64,") == body.count("<figure>") == 14


def test_several_runs_are_beside_each_other(tmp_path: Path) -> None:
    runs = [small_run(tmp_path / place / "run") for place in ("here", "there")]
    page = write_report(runs, tmp_path / "both.html").read_text(encoding="utf-8")
    assert "here/run, all held-out rows" in page
    assert "there/run, watched rows" in page
    assert "Which experts did what?" not in page


def test_a_run_without_rounds_is_named(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", RunConfig()).close()
    with pytest.raises(UserError, match="no round is complete yet"):
        write_report([tmp_path / "run"])
    with pytest.raises(UserError, match="no such run folder"):
        write_report([tmp_path / "nothing"])


def test_a_thousand_clients_and_a_hundred_rounds_fit(tmp_path: Path) -> None:
    experts = [32] * 8
    with RunFolder.create(tmp_path / "run", RunConfig()) as folder:
        draws = np.random.default_rng(0)
        usage = draws.random((50, sum(experts)), np.float32)
        clients = [entry(client) for client in range(1000)]
        folder.append_round({"round": 0, "evaluation": {"all": figures(0.1)}, "clients": []})
        for round in range(1, 101):
            with folder.expert_rows(round, experts) as add:
                for client in range(50):
                    add(client, usage[client], usage[client], usage[client] > 0.5, usage[client] > 0.6)
            line = {"round": round, "evaluation": {"watch": figures(round / 100)}, "bytes_down": 1, "bytes_up": 1}
            folder.append_round(line | {"seconds": 1.0}, clients if round % 20 == 0 else clients[:50])
    assert write_report([tmp_path / "run"]).stat().st_size < 10 * MB


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt install chromium")
def test_a_browser_shows_it_without_an_error_and_sorts_tables(tmp_path: Path) -> None:
    assert CHROMIUM is not None
    path = write_report([small_run(tmp_path / "run")])
    seen = """<script>addEventListener("load", () => setTimeout(() => {
      const drawn = [...document.querySelectorAll("figure [data-root-id]")];
      const button = [...document.querySelectorAll("th button")].find(b => b.textContent === "rounds");
      const first = () => document.querySelector("table.sortable tbody tr").cells[0].textContent;
      button.click(); const up = first(); button.click(); const down = first();
      const loaded = performance.getEntriesByType("resource").map(entry => entry.name);
      document.title = JSON.stringify({drawn: drawn.filter(d => d.children.length).length, up, down, loaded});
    }, 1000))</script></body>"""
    page = path.read_text(encoding="utf-8")
    assert page.count("</body>") == 1
    path.write_text(page.replace("</body>", seen), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=10000"]
    ran = subprocess.run(
        [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert not [line for line in ran.stderr.splitlines() if re.search(r"(ERROR|WARNING):CONSOLE", line)]
    title = re.search(r"<title>(.*?)</title>", ran.stdout)
    assert title is not None
    found = json.loads(title.group(1))
    assert found == {"drawn": 14, "up": "south.csv", "down": "north.csv", "loaded": []}
