"""The Triton kernels beside torch's own operations, run by Triton's interpreter, and compiled for a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip(
    "triton", reason="Triton comes with torch for GPUs; without one: pip install --no-deps triton==3.6.0"
)
FOLDER = Path(__file__).parent


@pytest.mark.parametrize("what", ["rows", "quantised", "compiled"])
def test_kernels(what: str) -> None:
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    interpreted = {} if what == "compiled" else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.moe.triton_checks", what],
        env={**os.environ, **interpreted},
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "checked"
