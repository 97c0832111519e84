"""The wheel has all of the package, and runs without the repository."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from hfedmoe.config.builtin import NAMES

ROOT = Path(__file__).parents[1]


def ran(*command: object, cwd: Path) -> str:
    """What a command prints, which must succeed. It sees no module of the repository."""
    hidden = {"PYTHONPATH", "PYTHONHOME"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the repository: building writes beside the sources."""
    pytest.importorskip("setuptools")
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "configs", source / "configs")
    unwritten = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", source / "src", ignore=unwritten)
    ran(sys.executable, "-c", f"import setuptools.build_meta as b; b.build_wheel({str(place)!r})", cwd=source)
    (built,) = place.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel and what it depends on, which is not installed again.

    A path file shows it the packages of this environment. Path files among these do not count there, so the editable
    install of the repository is not seen.
    """
    environment = tmp_path_factory.mktemp("installed") / "env"
    ran(sys.executable, "-m", "venv", "--without-pip", environment, cwd=wheel.parent)
    python = environment / "bin" / "python"
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--quiet", "--python", python)
    ran(*pip, "install", "--no-deps", "--no-index", "--no-compile", wheel, cwd=wheel.parent)
    return environment / "bin"


def test_it_has_every_file_of_the_package_and_the_shipped_configs(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "src" / "hfedmoe"
    files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {str(path.relative_to(package.parent)) for path in files} <= packed
    assert {f"hfedmoe/configs/{name}.toml" for name in NAMES} <= packed


@pytest.mark.slow
def test_alone_in_an_environment_it_runs_a_federation(installed: Path, tmp_path: Path) -> None:
    found = ran(installed / "python", "-c", "import hfedmoe; print(hfedmoe.__file__)", cwd=tmp_path)
    assert Path(found.strip()).is_relative_to(installed.parent)
    short = ("--set", "federation.rounds=1", "--set", "train.steps=1", "--set", "threads=1")
    ran(installed / "hfedmoe", "run", "tiny", "--out", "first", *short, cwd=tmp_path)
    rounds = [json.loads(line) for line in (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in rounds if "round" in line][:2] == [0, 1]
    assert "<figure>" in (tmp_path / "first" / "report.html").read_text(encoding="utf-8")
