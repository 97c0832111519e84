"""Flower's programs, as they are started here."""

import subprocess
import sys

import pytest

FAILS = """
import sys, threading, time
from hfedmoe.fleet import lean

class Program:
    def load(self):
        return self.run

    def run(self):
        threading.Thread(target=time.sleep, args=(60,)).start()  # as Flower's HTTP server, it would keep the process
        print(sys.argv)
        raise ERROR

lean.entry_points = lambda **_: [Program()]
sys.argv = ["lean", "flower-supernode", "--x"]
lean.main()
"""


@pytest.mark.parametrize(("error", "code"), [("OSError('broke')", 1), ("SystemExit(201)", 201)])
def test_a_program_that_fails_ends_although_its_threads_go_on(error: str, code: int) -> None:
    script = FAILS.replace("ERROR", error)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.returncode == code
    assert done.stdout == "['flower-supernode', '--x']\n"
    assert ("broke" in done.stderr) == ("broke" in error)
