"""The time that the in-process carrier adds to the clients' training and the server's evaluation.

    python -m benchmarks.carrier runs/2026-11-22-r8-hfedmoe [--json FILE]

Reads the times that a run saved. Overhead is the time of a round without planning (in the first round a forward pass
over the clients' data), local training and evaluation: it is packing, checking, folding and writing.
"""

import statistics
from pathlib import Path
from typing import Any

from benchmarks.common import parser, report
from hfedmoe.runs.folder import RunFolder


def rows_of(run: Path) -> list[dict[str, Any]]:
    """One row per round of a run."""
    rows = []
    for line in RunFolder.open(run).read_rounds():
        if line["round"] == 0:
            continue
        work = line["seconds_training"] + line["seconds_evaluation"]
        overhead = line["seconds"] - line["seconds_planning"] - work
        rows.append(
            {
                "round": line["round"],
                "seconds": line["seconds"],
                "planning": line["seconds_planning"],
                "training": line["seconds_training"],
                "evaluation": line["seconds_evaluation"],
                "overhead": overhead,
                "overhead_share": overhead / work,
                "MB moved": (line["bytes_down"] + line["bytes_up"]) / 1e6,
            }
        )
    return rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("run", type=Path, help="folder of a finished run")
    options = arguments.parse_args()
    rows = rows_of(options.run)
    report(rows, {"overhead_share": statistics.median(row["overhead_share"] for row in rows)}, options.json)


if __name__ == "__main__":
    main()
