"""Folders that are whole or not there, and errors that name what failed."""

import pytest

from hfedmoe.errors import UserError
from hfedmoe.export.folder import writing, written_whole


def test_the_folder_is_there_when_the_block_ends_well(tmp_path):
    with written_whole(tmp_path / "out") as scratch:
        (scratch / "file").write_text("x")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "file").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_failed_writes_are_blamed_on_the_folder(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="gone"), written_whole(out):
        (tmp_path / "gone").read_text()
    with pytest.raises(UserError, match="out: cannot be written"), written_whole(out) as scratch, writing(out):
        (scratch / "missing" / "file").write_text("x")
    assert not list(tmp_path.iterdir())
