"""The tests of a CUDA GPU where there is none: they can all be collected, and some run on the CPU."""

import os
import subprocess
import sys


def test_a_few_of_them_run_on_the_cpu() -> None:
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "tests/cuda", "-k", "routing and few"]
    dry = os.environ | {"HFEDMOE_CUDA_TESTS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dry)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    assert "skipped" not in done.stdout
