"""A hub that never answers costs seconds, not minutes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

OUR_OWN = {"no_proxy", "NO_PROXY", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["inspect some/model", "run tiny --out out --set data.source=some/data"])
def test_a_proxy_that_never_answers(tmp_path: Path, command: str) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as hole:  # accepts, and says nothing
        proxy = f"http://127.0.0.1:{hole.getsockname()[1]}"
        environment = {name: value for name, value in os.environ.items() if name not in OUR_OWN}
        environment |= {"HTTPS_PROXY": proxy, "https_proxy": proxy, "HF_HOME": str(tmp_path / "hub")}
        done = subprocess.run(
            [sys.executable, "-m", "hfedmoe", *command.split()],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,  # the wait for the hub is 6 s; the rest is importing on a busy machine
            check=False,
        )
    assert done.returncode == 2
    assert "cannot be reached" in done.stderr
    assert "some/" in done.stderr
    assert "Traceback" not in done.stderr
