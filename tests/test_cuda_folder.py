"""The tests of a CUDA GPU where there is none: they can be collected, and say why they do not run."""

import os
import subprocess
import sys

import pytest

KINDS = ["test_experts.py", "test_families.py", "test_federation.py", "test_memory.py", "test_waits.py"]


@pytest.mark.slow
def test_they_are_skipped_without_a_gpu_and_run_on_the_cpu_if_asked() -> None:
    def ran(*arguments: str, **changes: str) -> str:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | changes)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    skipped = ran("tests/cuda", CUDA_VISIBLE_DEVICES="")
    assert "needs a CUDA GPU" in skipped
    assert all(name in skipped for name in KINDS)
    assert " passed" not in skipped
    dry = ran("tests/cuda/test_experts.py", "-k", "few or none", "-v", HFEDMOE_CUDA_TESTS="cpu")
    assert "PASSED" in dry
    assert "SKIPPED" not in dry
