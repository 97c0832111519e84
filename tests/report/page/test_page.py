"""The page itself: one file that needs nothing else."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hfedmoe.config import RunConfig
from hfedmoe.errors import UserError
from hfedmoe.report.page.page import write_report
from hfedmoe.runs.folder import RunFolder
from tests.report.page.browser import browser, errors, needs_browser
from tests.report.page.runs import entry, figures, small_run

MB = 10**6


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


def site(client: int, **other: Any) -> dict[str, Any]:
    """What a site gained, as in metrics.jsonl."""
    score = {"accuracy": 0.5, "macro_f1": 0.4, "loss": 1.0, "interval": [0.25, 0.75]}
    found = {"client": client, "name": f"site {client}", "trained_rows": 18, "own_rows": 2, "labels": {"acq": 20}}
    found |= {"num_labels": 2, "before": score | {"accuracy": 0.125}, "federated": score, "alone": None}
    return found | {"gain": 0.375, "gain_interval": [0.1, 0.6]} | other


def test_what_each_site_gained(tmp_path: Path) -> None:
    path = small_run(tmp_path / "run")
    with RunFolder.open(path, to_write=True) as folder:
        words = {"accuracy": None, "macro_f1": None, "loss": 2.5, "interval": None}
        part = site(2, federated=None, own=site(2)["federated"])
        other = site(1, before=words, federated=words, num_labels=0, gain=None, gain_interval=None)
        folder.append_round({"round": 3, "evaluation": {}, "clients": [], "sites": [site(0), other, part]})
    page = write_report([path]).read_text(encoding="utf-8")
    assert "What did each site gain?" in page
    assert ">site 0</td><td>18</td><td>2</td>\n<td>1 of 2</td>" in page
    assert "<td>12.5 %</td>" in page
    # A device that measured only its own experts.
    assert '<button type="button">own</button>' in page
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page.partition("site 2</td>")[2].partition("</tr>")[0])
    assert cells[3:7] == ["12.5 %", "–", "50.0 %", "25.0 % to 75.0 %"]
    assert "25.0 % to 75.0 %" in page
    assert 'class="good">+38 (+10 to +60)</td>' in page
    assert "<td>loss 2.500</td>" in page
    assert "federated less\nbefore." in page
    assert "What did each site gain?" not in write_report([small_run(tmp_path / "other")]).read_text(encoding="utf-8")


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


@needs_browser
def test_a_browser_shows_it_without_an_error_and_sorts_tables(tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    path = write_report([small_run(tmp_path / "run")])
    drawn = "return [...document.querySelectorAll('figure [data-root-id]')].filter(d => d.children.length).length"
    with browser(tmp_path) as driver:
        driver.get(path.as_uri())
        WebDriverWait(driver, 180).until(lambda driver: driver.execute_script(drawn) == 14)
        head = next(b for b in driver.find_elements(By.CSS_SELECTOR, "th button") if b.text == "rounds")
        shown = []
        for _ in range(2):
            head.click()
            shown.append(driver.find_element(By.CSS_SELECTOR, "table.sortable tbody td").text)
        assert shown == ["south.csv", "north.csv"]
        assert driver.execute_script("return performance.getEntriesByType('resource').length") == 0
        assert errors(driver) == []
        driver.set_window_size(400, 800)  # a phone
        driver.get(path.as_uri())
        wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        WebDriverWait(driver, 180).until(lambda driver: driver.execute_script(wide) <= 0)
