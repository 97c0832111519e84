"""Draw the final screen of a finished run as an SVG picture, for the README.

python tools/run_picture.py runs/2026-11-22-r8-hfedmoe docs/demo.svg
"""

import re
import sys
from pathlib import Path
from typing import Literal

from rich.console import Console

from hfedmoe.events import Evaluation, Participant
from hfedmoe.report.live import Live
from hfedmoe.runs.folder import RunFolder
from hfedmoe.server.keeper import Keeper


def main(run: Path, picture: Path) -> None:
    """Print the run's final table on a recording console and save the picture."""
    with RunFolder.open(run) as folder, open("/dev/null", "w") as nowhere:
        keeper, rounds = Keeper(folder), folder.read_rounds()
        console = Console(record=True, width=104, file=nowhere, force_terminal=False)
        now = [0.0]
        watcher = Live(console, lambda: now[0])
        first = next(line for line in rounds if line["round"] == 1)
        rows = {row["client"]: row for row in first["clients"]}
        who = {
            n: Participant(f"client {n}", row["examples"], row["resident"], row["resident"] / row["total_experts"])
            for n, row in sorted(rows.items())
        }
        keeper.folder = None  # nothing is written
        keeper.introduce(who)
        watcher.start(folder.config.name, folder.config.federation.rounds, 1, list(who.values()))
        for line in rounds:
            if line["round"]:
                watcher.round_started(line["round"])
            for kind, metrics in line["evaluation"].items():
                trained = "choice_loss" if folder.config.train.loss == "choices" else "loss"
                accuracy, macro_f1, loss = (metrics[name] for name in ("accuracy", "macro_f1", trained))
                which: Literal["all", "watch"] = "all" if kind == "all" else "watch"
                watcher.evaluated(Evaluation(line["round"], accuracy, macro_f1, loss, metrics["examples"], which))
            if line["round"]:
                now[0] += line["seconds"]
                watcher.round_done(line["round"], line["seconds"], line["bytes_down"], line["bytes_up"])
        watcher.final_table(keeper.final_totals(), keeper.scores[0], keeper.scores[-1])
        svg = console.export_svg(title="hfedmoe run")
        # Use the reader's own monospace font: a picture in a README must not download one.
        picture.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
