"""`hfedmoe compare`: cells, then the table and the figures made of them."""

import re
from pathlib import Path

from hfedmoe.compare.computing import cells_of, compute_missing
from hfedmoe.compare.figures import draw
from hfedmoe.compare.summary import as_csv, as_markdown, target_of
from hfedmoe.config import RunConfig
from hfedmoe.errors import UserError
from hfedmoe.files.disk import disk_errors
from hfedmoe.method.methods import METHODS
from hfedmoe.report.progress import counted

CELLS = "cells"


def compare(config: RunConfig, methods: str, seeds: str, out: Path, jobs: int | None, target: float | None) -> str:
    """Compute what is missing, write table.md, table.csv and figures, and return the table.

    Args:
        methods: names with commas; the first is the reference of the tests.
        seeds: numbers with commas, or a range such as 0-4.

    Raises:
        UserError: an unknown method, seeds that are none, or a cell that cannot be computed.
    """
    names, numbers = _names(methods), _numbers(seeds)
    with disk_errors(out, "choose another --out"):
        (out / CELLS).mkdir(parents=True, exist_ok=True)
    cells = cells_of(config, names, numbers)
    with counted(len(cells), "cells") as update:
        results = compute_missing(cells, out / CELLS, jobs, update)
    wanted = target_of(results, names[0]) if target is None else target
    table = as_markdown(results, names[0], wanted)
    with disk_errors(out, "choose another --out"):
        (out / "table.md").write_text(table, encoding="utf-8")
        (out / "table.csv").write_text(as_csv(results, wanted), encoding="utf-8")
    return f"{table}\n{draw(results, out)}"


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        wrong = unknown[0] if unknown else "nothing"
        raise UserError(f"--methods {text}: {wrong} is no method; `hfedmoe methods` lists them")
    return list(dict.fromkeys(names))


def _numbers(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part.strip())
        if ends is None or int(ends[2] or ends[1]) < int(ends[1]):
            raise UserError(f"--seeds {text}: expected numbers such as 0-4 or 0,2,5")
        found += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    return list(dict.fromkeys(found))
