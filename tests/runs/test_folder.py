"""A run folder is made, opened and locked."""

import subprocess
import sys
from pathlib import Path

import pytest

from hfedmoe.errors import UserError
from hfedmoe.runs.folder import RunFolder
from tests.runs.conftest import CONFIG
from tests.runs.writing import child


def test_create_names_by_date_and_counts_up(tmp_path):
    names = []
    for _ in range(3):
        with RunFolder.create(None, CONFIG, root=tmp_path / "runs") as folder:
            names.append(folder.path.name)
    assert names[0].endswith("-r8-hfedmoe")
    assert names[1:] == [names[0] + "-2", names[0] + "-3"]


def test_create_takes_an_empty_folder_and_what_a_failed_start_left(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".tmp-config.toml").touch()
    RunFolder.create(tmp_path, CONFIG).close()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "config.toml"]


def test_create_refuses_a_run_other_files_and_a_file(run, tmp_path):
    with pytest.raises(UserError, match=r"already has a run; choose another --out, or `hfedmoe resume .*run`"):
        RunFolder.create(run.path, CONFIG)
    (tmp_path / "note").touch()
    with pytest.raises(UserError, match=r"not empty \(note\); choose another --out"):
        RunFolder.create(tmp_path, CONFIG)
    assert not (tmp_path / ".lock").exists()
    with pytest.raises(UserError, match="is a file"):
        RunFolder.create(tmp_path / "note", CONFIG)


@pytest.mark.parametrize("below", ["note/run", "note/deep/run"])
def test_create_below_a_file_is_a_user_error(tmp_path, below):
    (tmp_path / "note").touch()
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder.create(tmp_path / below, CONFIG)
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder.create(None, CONFIG, root=tmp_path / below)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_create_in_an_unwritable_place_is_a_user_error():
    with pytest.raises(UserError, match=r"/proc/run: cannot be written .*choose another --out"):
        RunFolder.create(Path("/proc/run"), CONFIG)


def test_only_one_writer_but_many_readers(run):
    with pytest.raises(UserError, match="another process is working on this run"):
        RunFolder.open(run.path, to_write=True)
    assert RunFolder.open(run.path).read_rounds() == []
    run.close()
    RunFolder.open(run.path, to_write=True).close()


def test_the_lock_dies_with_its_process(run):
    run.close()
    code = """
import sys, time
from pathlib import Path
from hfedmoe.runs.folder import RunFolder
run = RunFolder.open(Path(sys.argv[1]), to_write=True)
print("locked", flush=True)
time.sleep(60)
"""
    with child(code, run.path) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="another process"):
            RunFolder.open(run.path, to_write=True)
        process.kill()
        process.wait()
    RunFolder.open(run.path, to_write=True).close()


def test_a_reader_cannot_write(run):
    with pytest.raises(AssertionError):
        RunFolder.open(run.path).append_round({"round": 1})


def test_importing_is_cheap():
    code = "import sys, hfedmoe.runs; print(sorted({'torch', 'safetensors', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
