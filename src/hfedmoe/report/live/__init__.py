"""The live output of a run.

    with Live() as live:
        live.start("r8-hfedmoe", num_rounds=5, first_round=1, clients=[ClientLine("client 0", 210, 14, 0.25)])
        live.round_started(1)
        live.client_started(1, 0, steps=2)
        live.step(0, 1, 2, loss=1.93)
        ...
        live.finish("done: runs/2026-11-22-r8-hfedmoe")
        live.final_table(lines, before, after)

On a terminal: progress bars, the accuracy so far and a table of the clients, redrawn in place. Elsewhere (a file, a
pipe, TERM=dumb): plain lines, one for each important event. For no output, use `events.Silent()`.
"""

import sys
import time
from collections.abc import Callable

from rich.console import Console

from hfedmoe.report.live.lines import Lines
from hfedmoe.report.live.screen import OnScreen
from hfedmoe.report.words import human_bytes, human_seconds

__all__ = ["Live", "human_bytes", "human_seconds"]


def Live(console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> Lines | OnScreen:
    """The watcher that suits the console (None: standard output)."""
    if console is None:
        # FORCE_COLOR must not put a live screen into a file: only a real terminal gets one.
        console = Console(force_terminal=None if sys.stdout.isatty() else False)
    # A terminal that cannot show the bars and arrows gets plain lines too.
    able = console.is_terminal and not console.is_dumb_terminal and console.encoding.lower().startswith("utf")
    return OnScreen(console, clock) if able else Lines(console, clock)
