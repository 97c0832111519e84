"""Invitations, and the commands that make a fleet."""

import json
import stat
from pathlib import Path

import pytest

from hfedmoe.cli import main
from hfedmoe.errors import UserError
from hfedmoe.fleet.folder import Folder, changing, opened
from hfedmoe.fleet.invite import read_invitation
from hfedmoe.fleet.keys import as_flower_has_it, new_key, private_key, public_of
from hfedmoe.fleet.roster import Roster


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hfedmoe(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    code = ended.value.code
    assert isinstance(code, int | None)
    return code or 0


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_an_invitation_is_all_that_a_device_needs_and_only_its_owner_reads_it(here: Path) -> None:
    assert hfedmoe("serve", "init", "fl.example.org", "--port", "8443") == 0
    assert hfedmoe("invite", "north", "--max-examples", "5000") == 0
    assert hfedmoe("invite", "south") == 0
    invitation = read_invitation(here / "north.invite")
    assert (invitation.name, invitation.number, invitation.address) == ("north", 0, "fl.example.org:8443")
    assert invitation.ca == (here / "fleet" / "ca.crt").read_text()
    assert invitation.key is not None
    (north, south) = Roster.read(here / "fleet" / "roster.json").devices
    assert north.max_examples == 5000
    assert south.max_examples is None
    assert as_flower_has_it(north.key) == as_flower_has_it(public_of(private_key(invitation.key, "test")))
    assert mode(here / "fleet") == 0o700
    secrets = ["north.invite", "fleet/ca.key", "fleet/server.key"]
    assert [mode(here / name) for name in secrets] == [0o600] * 3
    private = (here / "north.invite").read_text()
    assert "PRIVATE KEY" in private
    assert not any("PRIVATE" in file.read_text() for file in (here / "fleet").glob("*.json"))


def test_a_device_may_make_its_own_key_which_never_leaves_it(here: Path) -> None:
    (here / "mine.pub").write_text(public_of(private_key(new_key(), "test")) + " me@home\n")
    hfedmoe("serve", "init", "::1")
    assert hfedmoe("invite", "north", "--key", "mine.pub") == 0
    invitation = read_invitation(here / "north.invite")
    assert invitation.key is None
    assert invitation.address == "[::1]:8000"


def test_a_removed_name_can_be_invited_again_with_another_key(here: Path) -> None:
    hfedmoe("serve", "init", "localhost")
    hfedmoe("invite", "north")
    first = read_invitation(here / "north.invite")
    assert hfedmoe("invite", "north") == 2
    assert hfedmoe("remove", "north") == 0
    assert hfedmoe("invite", "north") == 2  # the old file is in the way, and is kept
    assert Roster.read(here / "fleet" / "roster.json").devices == ()
    assert read_invitation(here / "north.invite") == first
    (here / "north.invite").unlink()
    assert hfedmoe("invite", "north") == 0
    assert read_invitation(here / "north.invite").key != first.key


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "init", "https://x"], "'https://x': give the name or the IP address under which"),
        (["invite", "north"], "fleet: no fleet here; `hfedmoe serve init HOST --fleet fleet` makes one"),
        (["remove", "north"], "fleet: no fleet here"),
        (["serve", "init"], "Missing argument 'HOST'; `hfedmoe serve init --help` explains"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hfedmoe(*arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


def test_a_fleet_is_never_overwritten(here: Path) -> None:
    hfedmoe("serve", "init", "localhost")
    before = (here / "fleet" / "ca.crt").read_bytes()
    assert hfedmoe("serve", "init", "localhost") == 2
    assert (here / "fleet" / "ca.crt").read_bytes() == before


def test_two_commands_do_not_change_the_roster_at_once(here: Path) -> None:
    hfedmoe("serve", "init", "localhost")
    folder: Folder = opened(here / "fleet")
    with changing(folder):
        assert hfedmoe("invite", "north") == 2
    assert hfedmoe("invite", "north") == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "of another version of hfedmoe"),
        ({"number": "0"}, "not an invitation, or damaged"),
        ({"key": 5}, "not an invitation, or damaged"),
        ({"more": 1}, "not an invitation, or damaged"),
    ],
)
def test_a_damaged_invitation_is_refused(change: dict[str, object], said: str, here: Path) -> None:
    hfedmoe("serve", "init", "localhost")
    hfedmoe("invite", "north")
    content = json.loads((here / "north.invite").read_text())
    (here / "bad.invite").write_text(json.dumps(content | change))
    with pytest.raises(UserError, match=rf"bad.invite: {said}"):
        read_invitation(here / "bad.invite")
