"""`hfedmoe serve --check`: what devices tell, what a server takes of it, and the table."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hfedmoe.fleet.allowed import Allowed
from hfedmoe.fleet.check import check
from hfedmoe.fleet.findings import BUDGET, MODEL, ROWS, VERSIONS, Finding, Report
from hfedmoe.fleet.invite import key_of, read_invitation
from hfedmoe.fleet.preflight import Preflight
from hfedmoe.fleet.reach import NoAnswerError, ask
from hfedmoe.wire.trouble import OWN_DATA
from tests.deployment.nodes import rows_file
from tests.fleet.places import hfedmoe, new_fleet, save_tiny
from tests.fleet.test_check import CONFIG, lines

FOUND = Report("run", (Finding(True, MODEL), Finding(True, ROWS, "secret", 1200), Finding(True, BUDGET, "", 24, 64)))
BAD = Report("run", (Finding(True, VERSIONS), Finding(False, ROWS, "cell 7 is leukaemia", code=OWN_DATA)))


def test_a_report_has_codes_and_counts_only() -> None:
    for report in (FOUND, BAD):
        text = report.to_json()
        assert "secret" not in text
        assert "leukaemia" not in text
        assert Report.from_json(text).failed == report.failed
    assert BAD.failed == ["its own rows do not fit the run; its log says which"]
    twice = replace(BAD, findings=BAD.findings * 2)
    assert twice.failed == BAD.failed  # one is enough


@pytest.mark.parametrize(
    "change",
    [
        {"about": "weather"},
        {"fits": 1},
        {"count": -1},
        {"of": 10**10},
        {"code": "\x1b[31m"},
        {"fits": False, "code": ""},
        {"text": "a word"},
    ],
)
def test_a_server_takes_no_other_report(change: dict[str, object]) -> None:
    tree = json.loads(FOUND.to_json())
    tree["findings"][0] |= change
    with pytest.raises(ValueError, match="not a finding"):
        Report.from_json(json.dumps(tree))
    for text in ("[" * 10_000, "[]", '{"run": 1, "findings": []}', '{"run": "a", "findings": []}', "no"):
        with pytest.raises(ValueError, match=r"not a report|Expecting value|nested too deep"):
            Report.from_json(text)


def test_the_table_has_a_line_per_device() -> None:
    found = Preflight(["north", "south", "east"], {"north": FOUND, "south": BAD}, {"south": BAD.failed[0]}, 1)
    head, north, south, east, last = found.as_text().splitlines()
    assert head.split()[:6] == ["device", "fits", "versions", "model", "rows", "tokenizer"]
    assert north.split() == ["north", "yes", "-", "yes", "1200", "-", "24", "of", "64", "-"]
    assert south.split()[:5] == ["south", "no", "yes", "-", "no"]
    assert south.endswith("its own rows do not fit the run; its log says which")
    assert east.split() == ["east", "not", "here", *["-"] * 6]
    assert last == "1 of 3 devices fit; not here: east"
    assert not found.fits
    assert Preflight(["north", "east"], {"north": FOUND}, {}, 1).fits
    short = Preflight(["north", "east"], {"north": FOUND}, {}, 2)
    assert not short.fits
    assert short.as_text().endswith("; federation.min_clients = 2")


def test_devices_that_are_here_are_checked_and_nothing_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    new_fleet(tmp_path, "north", "south")
    source = rows_file(tmp_path / "server.csv", "earn", "acq", "crude", rows=24)
    (tmp_path / "my.toml").write_text(CONFIG.format(model=save_tiny(tmp_path / "model"), source=source))
    own = {
        "north": rows_file(tmp_path / "north.csv", "crude", "earn", rows=7),
        "south": rows_file(tmp_path / "south.csv", "leukaemia", rows=3),
    }
    said: dict[str, list[Finding]] = {}
    # Devices are processes of their own. Here they are threads, and torch's meta device is one for all threads.
    one_after_the_other = threading.Lock()

    def device(name: str) -> None:
        invitation = read_invitation(tmp_path / f"{name}.invite")
        while True:
            try:
                offer = ask(invitation, key_of(invitation, None))
                break
            except NoAnswerError:
                time.sleep(0.05)
        assert offer.purpose == "check"
        allowed = Allowed(own[name], "50%", str(tmp_path / "model"))
        with one_after_the_other:
            said[name] = list(check(invitation, None, allowed, telling=True))

    devices = [threading.Thread(target=device, args=(name,)) for name in own]
    for thread in devices:
        thread.start()
    capsys.readouterr()
    assert hfedmoe("serve", "--check", "my.toml", "--listen", "127.0.0.1") == 1
    for thread in devices:
        thread.join()
    shown, _ = lines(capsys)
    assert "2 of 2 devices checked" in shown
    assert next(line for line in shown if line.startswith("north ")).split() == [
        *("north", "yes", "yes", "yes", "7", "yes", "16", "of", "32", "-")
    ]
    assert next(line for line in shown if line.startswith("south ")).endswith("do not fit the run; its log says which")
    assert shown[-1] == "1 of 2 devices fit"
    assert "leukaemia" not in "\n".join(shown)
    assert any("leukaemia" in finding.text for finding in said["south"])
    assert not (tmp_path / "runs").exists()
    assert hfedmoe("serve", "--check", "my.toml", "--out", "runs/x") == 2
