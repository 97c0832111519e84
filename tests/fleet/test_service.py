"""Units for systemd, and a file for containers: what they start is what `hfedmoe` accepts."""

import configparser
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hfedmoe.errors import UserError
from hfedmoe.fleet.service import quoted
from tests.deployment.nodes import rows_file
from tests.fleet.places import hfedmoe, new_fleet, save_tiny

EXAMPLES = Path(__file__).parents[2] / "examples"


class Unit:
    """A unit, as systemd reads it."""

    def __init__(self, path: Path) -> None:
        self._read = configparser.ConfigParser(interpolation=None, strict=True)
        self._read.optionxform = str  # type: ignore[assignment,method-assign]
        self._read.read(path)

    def __getitem__(self, key: str) -> str:
        return self._read["Service"][key]

    @property
    def command(self) -> list[str]:
        """The words of ExecStart. Quotes of systemd are those of a shell, if `$` and `%` are doubled."""
        return [word.replace("$$", "$").replace("%%", "%") for word in shlex.split(self["ExecStart"])]


def verify(path: Path) -> None:
    """Have systemd look at a unit, where there is one."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        return
    done = subprocess.run([analyze, "verify", "--man=no", str(path)], capture_output=True, text=True, check=False)
    told = [line for line in done.stderr.splitlines() if path.name in line]
    assert told == [], done.stderr


def test_a_device_becomes_a_service_of_its_owner(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "of 100% $HOME"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    port = new_fleet(place, "north")
    rows_file(place / 'the "rows".csv', "earn", "acq", rows=6)
    save_tiny(place / "model")
    options = ["--data", 'the "rows".csv', "--model", "model", "--budget", "25%", "--delimiter", ";"]
    options += ["--max-steps", "40", "--max-experts", "20", "--max-seconds", "90", "--min-batch", "4"]
    options += ["--columns", 'text, "a, b"', "--labels", "acq,earn"]
    capsys.readouterr()
    assert hfedmoe("join", "north.invite", *options, "--service") == 0
    said = capsys.readouterr().out
    path = tmp_path / "config" / "systemd" / "user" / "hfedmoe-north.service"
    assert str(path) in said
    for command in ("systemctl --user daemon-reload", "systemctl --user enable --now hfedmoe-north.service", "linger"):
        assert command in said
    verify(path)
    unit = Unit(path)
    assert unit.command[:3] == [sys.executable, "-m", "hfedmoe"]
    words = unit.command[3:]
    assert words[:2] == ["join", str(place / "north.invite")]
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert given == {
        "--data": str(place / 'the "rows".csv'),
        "--budget": "25%",
        "--folder": str(place / "north.device"),
        "--model": str(place / "model"),
        "--delimiter": ";",
        "--max-experts": "20",
        "--max-steps": "40",
        "--max-seconds": "90.0",
        "--min-batch": "4",
        "--columns": 'text,"a, b"',
        "--labels": "acq,earn",
    }
    assert not (place / "north.device").exists()  # nothing was joined
    # The command is one that hfedmoe accepts: it goes as far as to look for its server.
    monkeypatch.chdir("/")
    assert hfedmoe(*words, "--check") == 1
    assert f"127.0.0.1:{port}: cannot be reached" in capsys.readouterr().err
    # Given again, with folders of models, it replaces the unit.
    monkeypatch.chdir(place)
    again = ["--data", 'the "rows".csv', "--models", ".", "--models", "/srv/models", "--no-measure"]
    assert hfedmoe("join", "north.invite", *again, "--service") == 0
    assert Unit(path).command[-5:] == ["--models", str(place), "--models", "/srv/models", "--no-measure"]
    assert hfedmoe("join", "north.invite", "--data", "missing.csv", "--service") == 2


def test_what_a_unit_cannot_hold_is_refused() -> None:
    assert [quoted(word) for word in ("a/b-c", "a b", 'a"b\\', "5%", "$HOME", ";")] == [
        "a/b-c",
        '"a b"',
        '"a\\"b\\\\"',
        "5%%",
        "$$HOME",
        '";"',
    ]
    with pytest.raises(UserError, match="cannot be in a service"):
        quoted("a\nExecStartPre=b")


@pytest.mark.parametrize("name", ["hfedmoe-server", "hfedmoe-device"])
def test_the_example_units_start_commands_that_hfedmoe_accepts(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (EXAMPLES / "systemd" / f"{name}.service").read_text()
    path = tmp_path / f"{name}.service"
    path.write_text(text.replace("/opt/hfedmoe/bin/hfedmoe", f"{sys.executable} -m hfedmoe"))
    verify(path)
    new_fleet(tmp_path, "north")
    monkeypatch.chdir(tmp_path)
    started = re.findall(r"/opt/hfedmoe/bin/hfedmoe ([^;']+)", Unit(EXAMPLES / "systemd" / path.name)["ExecStart"])
    assert len(started) == (2 if name == "hfedmoe-server" else 1)
    for command in started:
        words = [word.replace("/etc/hfedmoe/", f"{tmp_path}/") for word in command.split()]
        capsys.readouterr()
        assert hfedmoe(*words, *(["--check"] if words[0] == "join" else [])) != 0
        # It is stopped by what this machine lacks, not by the command line.
        lacks = {"join": "cannot be reached", "--resume": "runs/first: no such run folder", "my.toml": "my.toml"}
        error = capsys.readouterr().err
        assert lacks[words[0] if words[0] == "join" else words[1]] in error
        assert "Usage" not in error


def test_the_container_is_built_from_files_that_are_there() -> None:
    lines = (EXAMPLES / "container" / "Containerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied
    for name in copied:
        assert (EXAMPLES.parent / name).exists(), name
    assert lines[-1] == 'ENTRYPOINT ["hfedmoe"]'
