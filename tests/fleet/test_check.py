"""`hfedmoe join --check` against a real front: what is wrong is said in one line each, on the device only."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from hfedmoe.errors import UserError
from hfedmoe.fleet import reach
from hfedmoe.fleet.allowed import Allowed
from hfedmoe.fleet.check import check
from hfedmoe.fleet.invite import read_invitation
from hfedmoe.models.tiny import tiny_tokenizer
from tests.deployment.nodes import rows_file
from tests.fleet.places import hfedmoe, new_fleet, offering, save_tiny

CONFIG = """
threads = 1
[model]
name = "{model}"
[data]
source = "{source}"
test_rows = 4
[clients]
count = 1
[train]
steps = 2
batch_size = 4
[partition]
min_rows = 1
[evaluation]
watch_rows = 0
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    source = rows_file(tmp_path / "server.csv", "earn", "acq", "crude", rows=24)
    return CONFIG.format(model=save_tiny(tmp_path / "model"), source=source)


def lines(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[str]]:
    """What was said: the lines that are well, and the failures."""
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err.splitlines()


def test_a_device_that_fits_is_told_so(tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    port = new_fleet(tmp_path, "north")
    shutil.copytree(tmp_path / "model", tmp_path / "mine")
    own = rows_file(tmp_path / "own.csv", "crude", "earn", rows=7)
    with offering(tmp_path / "fleet", port, config) as board:
        capsys.readouterr()
        arguments = ["--data", own, "--model", tmp_path / "mine", "--budget", "50%"]
        assert hfedmoe("join", tmp_path / "north.invite", *arguments, "--check") == 0
        assert board.seen["north"].versions.startswith("hfedmoe ")
    said, failed = lines(capsys)
    assert not failed
    for expected in ("answers and knows north", "the server's weights", "7 rows can be read", "tokenizer", "16 of 32"):
        assert any(expected in line for line in said), expected


def test_each_thing_that_does_not_fit_has_a_line_of_its_own(
    tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    port = new_fleet(tmp_path, "north")
    other = save_tiny(tmp_path / "other", seed=1)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["strange"])
    tokenizer.save_pretrained(other)
    own = rows_file(tmp_path / "own.csv", "earn", "leukaemia", rows=6)
    with offering(tmp_path / "fleet", port, config) as board:
        capsys.readouterr()
        arguments = ["--data", own, "--model", other, "--budget", "2"]
        assert hfedmoe("join", tmp_path / "north.invite", *arguments, "--check") == 1
        list(check(read_invitation(tmp_path / "north.invite"), None, Allowed(own, 2, str(other)), telling=True))
    _, failed = lines(capsys)
    weights, rows, tokens, budget = failed
    assert "other: its weights are not the server's" in weights
    assert 'own.csv line 3: the label "leukaemia"' in rows
    assert "(lines 3, 5, 7)" in rows
    assert "other: its tokenizer is not the server's" in tokens
    assert "2 of 32 experts, but top-2 routing in 4 layers needs at least 8" in budget
    weights, rows, tokens, budget = board.reports["north"].failed
    assert weights.startswith("its base model is not the server's: other weights")
    assert rows == "its own rows do not fit the run; its log says which"
    assert tokens == "its tokenizer is not the server's; give both the same checkpoint"
    assert budget == "cannot take part with its settings, model or data; its log says why"
    assert board.refused["north"] == "; ".join((weights, rows, tokens, budget))


def test_a_server_does_not_choose_the_models_that_a_device_opens(
    tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    port = new_fleet(tmp_path, "north")
    own = rows_file(tmp_path / "own.csv", "earn")
    with offering(tmp_path / "fleet", port, config):
        capsys.readouterr()
        assert hfedmoe("join", tmp_path / "north.invite", "--data", own, "--check") == 1
    _, (failed,) = lines(capsys)
    assert "say with --model where this device has it" in failed


def test_other_versions_are_named(tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    port = new_fleet(tmp_path, "north")
    with offering(tmp_path / "fleet", port, config) as board:
        assert board.offer is not None
        board.offer = dataclasses.replace(board.offer, versions="hfedmoe 99.0, flwr 1.42.0")
        capsys.readouterr()
        assert hfedmoe("join", tmp_path / "north.invite", "--data", tmp_path / "own.csv", "--check") == 1
    _, (failed,) = lines(capsys)
    assert "the server has hfedmoe 99.0, flwr 1.42.0, this device hfedmoe " in failed


def test_a_server_names_a_device_of_another_version(
    tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = new_fleet(tmp_path, "north")
    with offering(tmp_path / "fleet", port, config) as board:
        monkeypatch.setattr(reach, "versions", lambda: "hfedmoe 0.0.9, flwr 1.42.0")
        capsys.readouterr()
        assert hfedmoe("join", tmp_path / "north.invite", "--data", tmp_path / "own.csv", "--check") == 1
        (tmp_path / "own.csv").write_text("text,label\n")
        assert hfedmoe("join", tmp_path / "north.invite", "--data", tmp_path / "own.csv") == 2
    _, (failed, refused) = lines(capsys)
    assert board.offer is not None
    for line in (failed, refused):
        assert f"the server has {board.offer.versions}, this device hfedmoe 0.0.9, flwr 1.42.0; install the" in line
    assert board.refused["north"].startswith(f"it has hfedmoe 0.0.9, flwr 1.42.0, the server {board.offer.versions};")


def test_who_is_not_on_the_roster_is_refused(tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    port = new_fleet(tmp_path, "north", "south")
    check = ["--data", rows_file(tmp_path / "own.csv", "earn"), "--model", tmp_path / "model", "--check"]
    with offering(tmp_path / "fleet", port, config):
        assert hfedmoe("join", tmp_path / "north.invite", *check) == 0
        assert hfedmoe("remove", "north", "--fleet", tmp_path / "fleet") == 0
        capsys.readouterr()
        assert hfedmoe("join", tmp_path / "north.invite", *check) == 1
        _, (failed,) = lines(capsys)
        assert "does not know the key of north; ask for a new invitation" in failed
        assert hfedmoe("join", tmp_path / "south.invite", *check) == 0


def test_another_server_and_no_server_are_told_apart(
    tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    port = new_fleet(tmp_path, "north")
    check = ["--data", tmp_path / "own.csv", "--check"]
    capsys.readouterr()
    assert hfedmoe("join", tmp_path / "north.invite", *check) == 1
    _, (failed,) = lines(capsys)
    assert f"127.0.0.1:{port}: cannot be reached" in failed
    (tmp_path / "elsewhere").mkdir()
    other = new_fleet(tmp_path / "elsewhere", "north")
    text = (tmp_path / "north.invite").read_text().replace(str(port), str(other))
    (tmp_path / "false.invite").write_text(text)
    with offering(tmp_path / "elsewhere" / "fleet", other, config) as board:
        capsys.readouterr()
        assert hfedmoe("join", tmp_path / "false.invite", *check) == 1
        _, (failed,) = lines(capsys)
        assert "is not the server of this invitation" in failed
        board.offer = None
        assert hfedmoe("join", tmp_path / "elsewhere" / "north.invite", *check) == 1
        _, (failed,) = lines(capsys)
        assert "answers, but serves no run now" in failed


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--budget", "2.5"], '--budget "2.5": expected a share'),
        (["--encoding", "hex"], "--encoding: "),
    ],
)
def test_wrong_options_are_one_line(
    option: list[str], said: str, tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    port = new_fleet(tmp_path, "north")
    own = rows_file(tmp_path / "own.csv", "earn")
    with offering(tmp_path / "fleet", port, config):
        capsys.readouterr()
        arguments = ["--data", own, "--model", tmp_path / "model", "--check"]
        assert hfedmoe("join", tmp_path / "north.invite", *arguments, *option) != 0
    _, failed = lines(capsys)
    assert len(failed) == 1
    assert said in failed[0]


def test_a_port_in_use_is_named(tmp_path: Path, config: str) -> None:
    port = new_fleet(tmp_path, "north")
    with (
        offering(tmp_path / "fleet", port, config),
        pytest.raises(UserError, match=rf"port {port}: cannot listen there \(Address already in use\)"),
        offering(tmp_path / "fleet", port, config),
    ):
        pass
