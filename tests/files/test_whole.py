"""Folders that are whole or not there, and errors that name what failed."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hfedmoe.errors import UserError
from hfedmoe.files.whole import writing, written_whole


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize(("mask", "folder", "file"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600)])
def test_the_folder_is_there_when_the_block_ends_well(tmp_path, mask, folder, file):
    out = tmp_path / "out"
    with umask(mask), written_whole(out) as scratch:
        (scratch / "file").write_text("x")
        (scratch / "below").mkdir()
        assert not out.exists()
    modes = {path: path.stat().st_mode & 0o777 for path in (out, out / "below", out / "file")}
    assert modes == {out: folder, out / "below": folder, out / "file": file}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_stays_itself_and_gets_the_entries(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    for out in (Path(), tmp_path / "link"):
        before = (tmp_path / "here").stat().st_ino  # of a mount point, or where a shell stands
        monkeypatch.chdir(tmp_path / "here")
        with written_whole(out) as scratch:
            (scratch / "below").mkdir()
            (scratch / "below" / "file").write_text("x")
        assert [str(path) for path in Path().rglob("*")] == ["below", "below/file"]
        assert (tmp_path / "here").stat().st_ino == before
        assert (tmp_path / "link").is_symlink()
        (tmp_path / "here" / "below" / "file").unlink()
        (tmp_path / "here" / "below").rmdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "link"]


KILLED = """
import os, signal, sys
from pathlib import Path
from hfedmoe.files.whole import written_whole

with written_whole(Path(sys.argv[1])) as scratch:
    (scratch / "big").write_text("x")
    os.kill(os.getpid(), int(sys.argv[2]))
"""


def end_by(number: int, out: Path) -> None:
    """Let a process that writes `out` end by a signal."""
    subprocess.run([sys.executable, "-c", KILLED, str(out), str(int(number))], check=False, capture_output=True)


@pytest.mark.parametrize("there", [False, True])
def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path, there):
    out = tmp_path / "out"
    if there:
        out.mkdir()
    place = out if there else tmp_path
    end_by(signal.SIGTERM, out)
    assert not list(place.glob(".*"))
    end_by(signal.SIGKILL, out)
    (left,) = place.glob(".out.tmp-*")
    other = place / ".other.tmp-aaaaaaaa"  # of another export
    if not there:
        other.mkdir()
    with written_whole(out) as used:
        assert not left.exists()
        with pytest.raises(KeyError), written_whole(out):
            raise KeyError
        assert used.is_dir()  # while somebody writes, it stays
        (used / "file").write_text("x")
    assert [path.name for path in out.iterdir()] == ["file"]
    assert other.is_dir() != there
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_only_failed_writes_are_blamed_on_the_folder(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="gone"), written_whole(out):
        (tmp_path / "gone").read_text()
    with pytest.raises(UserError, match="out: cannot be written"), written_whole(out) as scratch, writing(out):
        (scratch / "missing" / "file").write_text("x")
    assert not list(tmp_path.iterdir())
