"""The page of a run that goes on."""

import asyncio
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import httpx
import pytest

from hfedmoe.errors import UserError
from hfedmoe.report.page.watching import _hosts, _Pages, app_for, served
from hfedmoe.runs.folder import RunFolder
from tests.report.page.browser import browser, errors, needs_browser
from tests.report.page.runs import entry, figures, small_run
from tests.report.page.visitor import shown


def get(address: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def add_round(path: Path, accuracy: float) -> None:
    """Round 3, as the run that goes on writes it."""
    with RunFolder.open(path, to_write=True) as folder:
        line = {"round": 3, "evaluation": {"all": figures(accuracy)}, "bytes_down": 1, "bytes_up": 1, "seconds": 1.0}
        folder.append_round(line | {"clients": [entry(0)]})


def test_a_browser_is_told_of_a_new_round_and_gets_it(tmp_path: Path) -> None:
    path = small_run(tmp_path / "run")
    with served(path, "127.0.0.1", 0) as address:
        page = get(address)[1]
        assert "75.0 %" in page
        seen = shown(page)
        with urllib.request.urlopen(f"{address}events?seen={seen}", timeout=60) as events:
            assert events.readline() == b": here\n"
            assert events.readline() == b"\n"
            add_round(path, 0.875)
            assert events.readline() == b"data: round\n"
        # What was written while a browser still loaded the page is told at once.
        with urllib.request.urlopen(f"{address}events?seen={seen}", timeout=60) as events:
            assert [events.readline() for _ in range(3)] == [b": here\n", b"\n", b"data: round\n"]
        status, page = get(address)
        assert status == 200
        assert "87.5 %" in page
        assert "3 of" in page
        assert shown(page) != seen
        assert get(f"{address}config.toml")[0] == 404  # nothing else of the folder is served
        request = urllib.request.Request(address, method="POST", data=b"x")
        with pytest.raises(urllib.error.HTTPError, match="405"):
            urllib.request.urlopen(request, timeout=60)


def test_before_the_first_round_the_page_waits(tmp_path: Path) -> None:
    path = small_run(tmp_path / "run")
    for name in ("metrics.jsonl", "experts.npy"):
        (path / name).unlink()
    with served(path, "127.0.0.1", 0) as address:
        page = get(address)[1]
        assert "no round is complete yet" in page
        assert shown(page).startswith("0-")


@pytest.mark.parametrize(
    ("host", "names", "others"),
    [
        ("127.0.0.1", ("127.0.0.1", "localhost", "[::1]"), ("evil.example", "127.0.0.1.evil.example", "")),
        ("::1", ("[::1]", "localhost"), ("evil.example",)),
        ("10.0.0.7", ("10.0.0.7",), ("evil.example", "localhost")),
        ("Box.example", ("box.example",), ("evil.example",)),
        ("0.0.0.0", ("10.0.0.7", "box.example"), ()),
    ],
)
def test_only_its_own_names_reach_the_page(host: str, names: tuple[str, ...], others: tuple[str, ...]) -> None:
    app = app_for(_Pages(Path("nowhere")), _hosts(host))

    def status(name: str) -> int:
        asked = httpx.ASGITransport(app=app)

        async def ask() -> int:
            async with httpx.AsyncClient(transport=asked, base_url="http://x") as client:
                return (await client.get("/nothing", headers={"Host": f"{name}:8000"})).status_code

        return asyncio.run(ask())

    assert [status(name) for name in names] == [404] * len(names)
    assert [status(name) for name in others] == [400] * len(others)


def test_other_addresses_need_a_token(tmp_path: Path) -> None:
    with served(small_run(tmp_path / "run"), "0.0.0.0", 0) as address:
        open_address, _, token = address.partition("?token=")
        assert len(token) >= 16
        assert get(open_address)[0] == 403
        assert get(f"{open_address}events")[0] == 403
        assert get(f"{open_address}?token={token[:-1]}")[0] == 403
        status, page = get(address)
        assert status == 200
        assert "75.0 %" in page


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    path = small_run(tmp_path / "run")
    with served(path, "127.0.0.1", 0) as address:
        port = int(address.rstrip("/").rpartition(":")[2])
        with (
            pytest.raises(UserError, match=rf"127\.0\.0\.1, port {port}: cannot listen there"),
            served(path, "127.0.0.1", port),
        ):
            pass
    with pytest.raises(UserError, match="cannot listen there"), served(path, "no.such.host.invalid", 0):
        pass


@needs_browser
def test_a_real_browser_shows_the_new_round(tmp_path: Path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    def accuracy(driver: Any) -> str:
        return driver.execute_script("return document.querySelector('.card b')?.textContent ?? ''")

    path = small_run(tmp_path / "run")
    with served(path, "127.0.0.1", 0) as address, browser(tmp_path) as driver:
        driver.get(address)
        assert accuracy(driver) == "75.0 %"
        assert errors(driver) == []
        add_round(path, 0.875)  # whether the page listens already or not
        WebDriverWait(driver, 180).until(lambda driver: accuracy(driver) == "87.5 %")
        last = json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["evaluation"]["all"]["accuracy"] == 0.875
