"""Flower's programs, as they are started here."""

import subprocess
import sys

FAILS = """
import sys, threading, time
from hfedmoe.fleet import lean

class Program:
    def load(self):
        return self.run

    def run(self):
        threading.Thread(target=time.sleep, args=(60,)).start()  # as Flower's HTTP server, it would keep the process
        raise OSError(f"broke: {sys.argv}")

lean.entry_points = lambda **_: [Program()]
sys.argv = ["lean", "flower-supernode", "--x"]
lean.main()
"""


def test_a_program_that_fails_ends_although_its_threads_go_on() -> None:
    done = subprocess.run([sys.executable, "-c", FAILS], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "broke: ['flower-supernode', '--x']" in done.stderr
