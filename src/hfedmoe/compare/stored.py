"""Results that are there already, in one folder or in those of several machines, and which of them a table takes."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from hfedmoe.compare.cells import Cell, Result
from hfedmoe.compare.grid import Point
from hfedmoe.config.reading import config_from_tree
from hfedmoe.errors import UserError

CELLS = "cells"
"""The folder of the cells in the folder of a comparison."""


class Stored:
    """Results by cell: of one, several of other machines, code or base models; of the same origin, the first counts."""

    def __init__(self) -> None:
        self._found: dict[str, list[Result]] = {}

    def add_folder(self, folder: Path) -> None:
        """All cells of a folder, or of its `cells`. Raises UserError if a file is not the result of a cell."""
        inside = folder / CELLS
        for path in sorted((inside if inside.is_dir() else folder).glob("*-seed*-*.json")):
            self.add(Result.read(path))

    def add(self, result: Result) -> None:
        """One result."""
        same = self._found.setdefault(_file_of(result), [])
        if all(other.origin != result.origin for other in same):
            same.append(result)

    def on_validation(self) -> "Stored":
        """The results that have figures on validation rows, with these in place of those on test rows."""
        found = Stored()
        for file, results in self._found.items():
            found._found[file] = [other for result in results if (other := result.on_validation()) is not None]
        return found

    def of(self, cell: Cell) -> list[Result]:
        """Those of a cell, in the order in which they were added."""
        return self._found.get(cell.file, [])


def _file_of(result: Result) -> str:
    """The name that the file would have today: settings that are newer than the result have their defaults.

    A default that has changed since then is another setting, and so another cell. A setting that is gone was either at
    its default, which the name does not tell, or makes a name that no cell has today.
    """
    try:
        config = config_from_tree(result.config, result.method)
    except UserError:  # a setting is gone
        return f"{result.method}-seed{result.seed}-{result.digest}.json"
    return Cell(result.method, result.seed, config).file


@dataclass
class Block:
    """What a table has at one point of the grid."""

    point: Point
    results: list[Result]
    """One for each row and seed, row after row; `method` is the name of the row."""
    others: list[Result] = field(default_factory=list)
    """More results of the same cells, of another machine, code or base model."""
    missing: list[str] = field(default_factory=list)
    """Cells without a result."""


def block_of(point: Point, cells: Sequence[Cell], stored: Stored) -> Block:
    """Of several results of a cell the table takes the one whose origin has most rows of that seed."""
    chosen: dict[str, Result] = {}
    for seed in dict.fromkeys(cell.seed for cell in cells):
        row = {cell.file: stored.of(cell) for cell in cells if cell.seed == seed}
        common = Counter(result.origin for results in row.values() for result in results)
        for file, results in row.items():
            if results:
                chosen[file] = max(results, key=lambda result: common[result.origin])  # the first of equals
    return Block(
        point,
        [replace(chosen[cell.file], method=cell.shown) for cell in cells if cell.file in chosen],
        [
            replace(result, method=cell.shown)
            for cell in cells
            for result in stored.of(cell)
            if result is not chosen[cell.file]
        ],
        [f"{cell.shown} {cell.seed}" for cell in cells if cell.file not in chosen],
    )


def merged(folders: Iterable[Path]) -> Stored:
    """The cells of several folders. Raises UserError if one does not exist, or a file is not the result of a cell."""
    stored = Stored()
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--from {folder}: no such folder")
        stored.add_folder(folder)
    return stored
