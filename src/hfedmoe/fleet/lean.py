"""Run one of Flower's programs so that it keeps its size.

    python -m hfedmoe.fleet.lean flower-supernode --superlink ...

Pieces of messages, 5 MiB each, are in requests and replies of HTTP libraries, and these are in reference cycles. Python
looks for cycles once many objects were made, but these are few and large: a SuperNode grew by 15 MiB with every round
of 43 MB. Here Python looks every few seconds, at the objects made since the start. The C library is told to give freed
pieces back to the system.

A program that fails ends: by itself a SuperNode whose connection broke in the handshake stayed, and did nothing.
"""

import gc
import os
import sys
import threading
import time
import traceback
from importlib.metadata import entry_points

EVERY_S = 5.0
FRUGAL = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_ARENA_MAX": "2"}
"""Environment of the process: by default glibc keeps freed pieces of up to 32 MiB, and they become fragmented."""


def lean(name: str) -> list[str]:
    """The beginning of the command for a program of Flower."""
    return [sys.executable, "-m", "hfedmoe.fleet.lean", name]


def _collect() -> None:
    while True:
        time.sleep(EVERY_S)
        gc.collect()


def _end(code: int) -> None:
    """End now: Flower's other threads would keep the process, and nobody would start it again."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Be the program that the first argument names."""
    del sys.argv[0]
    (program,) = entry_points(group="console_scripts", name=sys.argv[0])
    run = program.load()
    gc.collect()
    gc.freeze()  # what was imported stays, so that looking takes no time
    threading.Thread(target=_collect, daemon=True).start()
    try:
        run()
    except SystemExit as end:
        if end.code not in (None, 0):
            _end(end.code if isinstance(end.code, int) else 1)
        raise
    except Exception:
        traceback.print_exc()
        _end(1)


if __name__ == "__main__":
    main()
