"""The page itself: one file that needs nothing else."""

import re
import shlex
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hfedmoe.config import RunConfig
from hfedmoe.errors import UserError
from hfedmoe.report.page.beside import differing, reached
from hfedmoe.report.page.page import write_report
from hfedmoe.report.page.story import read_story
from hfedmoe.report.page.tables import Cell
from hfedmoe.runs.about import LONGEST, TEXTS, About, Part
from hfedmoe.runs.folder import RunFolder
from tests.report.page.browser import browser, errors, needs_browser
from tests.report.page.runs import entry, figures, small_run

MB = 10**6


def test_a_page_holds_everything_and_nothing_of_a_text_becomes_markup(tmp_path: Path) -> None:
    path = write_report([small_run(tmp_path / "a run")])
    page = path.read_text(encoding="utf-8")
    assert path == tmp_path / "a run" / "report.html"
    assert shlex.join(["hfedmoe", "run", f"{path.parent}/config.toml", "--out", "another-folder"]) in unescape(page)
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
    assert "95 %: 30 to 95 %" in body
    assert "a run ran on an abacus, 2 threads, cpu, 16.0 GiB of memory." in body
    assert "hfedmoe run" in body
    assert body.count("data:text/csv;base64,") == body.count("<figure>") == 12


SCORE = {"accuracy": 0.5, "macro_f1": 0.4, "loss": 1.0, "interval": [0.25, 0.75]}
TUNED = {"steps": 4, "before": SCORE, "after": SCORE, "gain": 0.25, "gain_interval": [0.1, 0.3]}


def site(client: int, **other: Any) -> dict[str, Any]:
    """What a site gained, as in metrics.jsonl."""
    found = {"client": client, "name": f"site {client}", "trained_rows": 18, "own_rows": 2, "labels": {"acq": 20}}
    found |= {"num_labels": 2, "before": SCORE | {"accuracy": 0.125}, "federated": SCORE, "alone": None}
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
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page[page.index("What did each site gain?") :])
    assert cells[:10] == [
        *("site 0", "18", "2", "1 of 2", "12.5 %, F1 0.40", "50.0 %, F1 0.40", "–", "25 to 75 %"),
        *("+38 (+10 to +60)", "site 1"),
    ]
    assert 'data-value="0.375" class="good">+38' in page
    assert '<td data-value="2.5">loss 2.500</td>' in page
    assert "Accuracy and macro-F1 (F1) on rows" in page
    # A device that measured only its own experts.
    assert '<button type="button">own</button>' in page
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page.partition("site 2</td>")[2].partition("</tr>")[0])
    assert cells[3:7] == ["12.5 %, F1 0.40", "–", "50.0 %, F1 0.40", "25 to 75 %"]
    assert "federated less\nbefore." in page
    assert ">alone<" not in page
    assert "What did each site gain?" not in write_report([small_run(tmp_path / "other")]).read_text(encoding="utf-8")


def test_several_runs_are_beside_each_other(tmp_path: Path) -> None:
    runs = [small_run(tmp_path / place / "run", seed=seed) for place, seed in (("here", 0), ("there", 7))]
    with RunFolder.open(runs[1], to_write=True) as folder:
        folder.amend_round(2, {"sites": [site(0), site(1, gain=-0.125)]})
    page = write_report(runs, tmp_path / "both.html").read_text(encoding="utf-8")
    assert "here/run, all held-out rows" in page
    assert "there/run, watched rows" in page
    assert "Which experts did what?" not in page
    shown = reached([read_story(path) for path in runs], ["here/run", "there/run"])
    here, there = ({head.text: cell.text for head, cell in zip(shown.heads, row, strict=True)} for row in shown.rows)
    assert (here["accuracy"], here["95 %"], here["sites gained"]) == ("75.0 %", "30 to 95 %", "–")
    assert there["sites gained"] == "+12 on before"  # the mean of +37.5 and -12.5
    settings = differing([read_story(path) for path in runs], ["here/run", "there/run"])
    assert settings.heads == [Cell("setting"), Cell("here/run", style="text"), Cell("there/run", style="text")]
    assert [[cell.text for cell in row] for row in settings.rows] == [["seed", "0", "7"]]
    same = write_report([runs[0], runs[0]], tmp_path / "same.html").read_text(encoding="utf-8")
    assert "All settings are the same." in same
    assert ">sites gained<" not in same  # nobody measured it


def test_a_run_without_rounds_is_named(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", RunConfig()).close()
    with pytest.raises(UserError, match="no round is complete yet"):
        write_report([tmp_path / "run"])
    with pytest.raises(UserError, match="no such run folder"):
        write_report([tmp_path / "nothing"])


def large_run(path: Path, every: int) -> Path:
    """1,000 clients and 100 rounds with all that a page can tell; clients and experts of one in `every` rounds."""
    experts, clients, draws = [32] * 8, range(1000), np.random.default_rng(0)
    usage = draws.random((len(clients), sum(experts)), np.float32)
    labels, rows = [f"topic {label}" for label in range(20)], 5000
    parts = [Part(n, f"site {n}.csv", 100, draws.integers(0, 10, 20).tolist(), 64) for n in clients]
    truth, texts = draws.integers(0, 20, rows).tolist(), ["word " * (LONGEST // 5)] * TEXTS
    with RunFolder.create(path, RunConfig()) as folder:
        folder.describe(About({"processor": "an abacus"}, labels, parts, truth, texts))
        folder.append_round({"round": 0, "evaluation": {"all": figures(0.1)}, "clients": []})
        folder.append_answers(0, truth)
        for round in range(1, 101):
            asked = clients if round % every == 0 else clients[:1]
            with folder.expert_rows(round, experts) as add:
                for client in asked:
                    add(client, usage[client], usage[client], usage[client] > 0.5, usage[client] > 0.6)
            found = {kind: figures(round / 100) for kind in ("all", "watch")}
            late = {"status": "late", "reason": "no answer in 600 s"}
            line = {"round": round, "evaluation": found, "bytes_down": 1, "bytes_up": 1, "seconds": 1.0}
            line |= {"sites": [site(client, tuning=TUNED) for client in clients]} if round == 100 else {}
            folder.append_round(line, [entry(n) | (late if n % 3 == 0 == round % 20 else {}) for n in asked])
            folder.append_answers(round, draws.integers(0, 20, rows).tolist())
    return path


@pytest.mark.parametrize("every", [50, pytest.param(1, marks=pytest.mark.faults)])  # 1 takes a minute
def test_a_thousand_clients_and_a_hundred_rounds_fit(tmp_path: Path, every: int) -> None:
    assert write_report([large_run(tmp_path / "run", every)]).stat().st_size < 10 * MB


SWITCHED = """return Bokeh.documents.flatMap(page => page.roots()).filter(figure => figure.tags.includes("switched"))
    .map(figure => [figure.below[0].axis_label, [...figure.renderers[0].data_source.data.x]])"""


@needs_browser
def test_a_browser_shows_it_without_an_error_and_sorts_tables(tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    path = write_report([small_run(tmp_path / "run")])
    drawn = "return [...document.querySelectorAll('figure [data-root-id]')].filter(d => d.children.length).length"
    with browser(tmp_path) as driver:
        driver.get(path.as_uri())
        WebDriverWait(driver, 180).until(lambda driver: driver.execute_script(drawn) == 12)
        head = next(b for b in driver.find_elements(By.CSS_SELECTOR, "th button") if b.text == "rounds")
        shown = []
        for _ in range(2):
            head.click()
            shown.append(driver.find_element(By.CSS_SELECTOR, "table.sortable tbody td").text)
        assert shown == ["south.csv", "north.csv"]
        driver.find_element(By.CSS_SELECTOR, "input[name=across][value^=minutes]").click()
        figures = driver.execute_script(SWITCHED)
        assert [axis for axis, _ in figures] == ["minutes of all rounds"] * 3
        assert figures[0][1] == [0, 2]
        opened = (
            "dispatchEvent(new Event('beforeprint')); return [...document.querySelectorAll('details')].map(d => d.open)"
        )
        assert driver.execute_script(opened) == [True, True]  # on paper nobody can open them
        assert driver.execute_script("return performance.getEntriesByType('resource').length") == 0
        assert errors(driver) == []
        driver.set_window_size(400, 800)  # a phone
        driver.get(path.as_uri())
        wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        WebDriverWait(driver, 180).until(lambda driver: driver.execute_script(wide) <= 0)
