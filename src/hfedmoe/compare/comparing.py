"""`hfedmoe compare`: cells, then the tables and the figures made of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hfedmoe.compare.cells import Cell, Result
from hfedmoe.compare.computing import cells_of, compute
from hfedmoe.compare.figures import draw
from hfedmoe.compare.grid import Point, seeds_of
from hfedmoe.compare.rows import all_differ, rows_of
from hfedmoe.compare.stored import CELLS, Stored, block_of, merged
from hfedmoe.compare.summary import as_csv, as_markdown, target_of
from hfedmoe.errors import UserError
from hfedmoe.files.disk import disk_errors
from hfedmoe.report.progress import counted


@dataclass(frozen=True)
class Comparison:
    """What to compare, and how."""

    methods: str
    """Rows with commas (`rows.rows_of`); the first is the reference of the tests."""
    seeds: str
    """Numbers with commas, or a range such as 0-4."""
    out: Path
    jobs: int | None = None
    """Cells at once; None: as there is room."""
    target: float | None = None
    """Target accuracy; None: 95 % of what the first method reaches, at each point of a grid."""
    sources: Sequence[Path] = ()
    """More folders with cells, besides the one in `out`."""
    only_stored: bool = False
    """Compute nothing; cells that are nowhere are left out of the tables."""
    on: Literal["test", "validation"] = "test"
    """The rows of the accuracies in tables and figures."""


def compare(points: Sequence[Point], asked: Comparison) -> str:
    """Compute what is missing, write table.md, table.csv and figures, and return the tables.

    Args:
        points: the configurations; one, or those of a grid.

    Raises:
        UserError: an unknown method or setting, seeds that are none, a cell that cannot be read, nothing to show. Or
            cells cannot be computed: then tables and figures of the others are written first.
    """
    rows, numbers = rows_of(asked.methods), seeds_of(asked.seeds)
    for point in points:
        all_differ(rows, point.config)
    cells = [cells_of(point.config, rows, numbers, point.label) for point in points]
    reference = rows[0].name
    folder = asked.out / CELLS
    with disk_errors(asked.out, "choose another --out"):
        folder.mkdir(parents=True, exist_ok=True)
    stored = merged([folder, *asked.sources])
    failed = [] if asked.only_stored else _compute(cells, stored, folder, asked.jobs)
    if asked.on == "validation":
        stored = stored.on_validation()
    blocks = [block_of(point, own, stored) for point, own in zip(points, cells, strict=True)]
    missing = [name for block in blocks for name in block.missing]
    if missing and not asked.only_stored and not failed:
        raise UserError(
            f"--on validation: {', '.join(missing)}: no figures on validation rows; if evaluation.watch_rows is not 0, "
            f"these cells are of an earlier version: move their files out of {CELLS} to compute them again, or leave "
            "them out with --only-stored"
        )
    blocks = [block for block in blocks if block.results]
    if failed and not blocks:
        raise UserError(f"no cell can be computed; {failed[0]}")
    if not blocks:
        raise UserError(f"--only-stored: none of the cells is stored in {folder} or in a folder of --from")
    targets = [target_of(block.results, reference) if asked.target is None else asked.target for block in blocks]
    table = as_markdown(blocks, reference, targets, asked.on)
    with disk_errors(asked.out, "choose another --out"):
        (asked.out / "table.md").write_text(table, encoding="utf-8")
        (asked.out / "table.csv").write_text(as_csv(blocks, reference, targets), encoding="utf-8")
        drawn = draw(blocks, asked.out, asked.on)
    if failed:
        raise UserError(
            f"some cells cannot be computed, {asked.out} has tables and figures of the others; {'; '.join(failed)}"
        )
    return f"{table}\n{drawn}"


def _compute(cells: list[list[Cell]], stored: Stored, folder: Path, jobs: int | None) -> list[str]:
    """Compute the cells that are stored nowhere, each once, and add them to `stored`.

    Returns:
        Each reason for which cells cannot be computed, after the names of these cells.
    """
    every = {cell.file: cell for own in cells for cell in own}
    missing = [cell for cell in every.values() if not stored.of(cell)]
    if not missing:
        return []
    done = len(every) - len(missing)
    with counted(len(every), "cells") as update:
        failed = compute(missing, folder, jobs, lambda now, going, left: update(done + now, going, left))
    for cell in missing:
        if cell.file not in failed:
            stored.add(Result.read(folder / cell.file))
    reasons: dict[str, list[str]] = {}
    for cell in missing:
        if cell.file in failed:
            name = f"{cell.shown} with seed {cell.seed}{f' ({cell.label})' if cell.label else ''}"
            reasons.setdefault(failed[cell.file], []).append(name)
    return [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
