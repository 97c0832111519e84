"""Where there is no `fcntl` and no `resource`, as on Windows, a run works and says what does not."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
import psutil, torch, transformers, flwr.app  # they look at the system by themselves
sys.modules["fcntl"] = sys.modules["resource"] = None  # importing them fails
import hfedmoe.device.launcher, hfedmoe.device.probe, hfedmoe.files.whole
from hfedmoe.device.limits import hold_process_to, run_limited
from hfedmoe import cli
assert hold_process_to(1 << 40) is False
try:
    run_limited(["true"], 1 << 30)
except OSError as error:
    print(error)
cli.main(sys.argv[1:])
"""


def test_a_run_without_fcntl_and_resource(tmp_path: Path) -> None:
    small = ["--set", "federation.rounds=1", "--set", "train.steps=1", "--set", "data.test_rows=20"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "run", "tiny", "--out", str(tmp_path / "run"), *small],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "start only one process on this run" in done.stderr
    assert "memory limits need Linux" in done.stdout
    assert "Traceback" not in done.stderr
