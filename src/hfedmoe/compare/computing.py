"""Compute the cells that are not there yet, several at once where the machine has room."""

import multiprocessing
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from hfedmoe.compare.cells import Cell, Result
from hfedmoe.compare.rows import Row
from hfedmoe.config import RunConfig
from hfedmoe.device.probe import available_memory, usable_cores
from hfedmoe.report.progress import Update

ROOM = 0.8
"""The share of what is free before the first cell that cells may take together."""
POLL_S = 0.2


def cells_of(config: RunConfig, rows: Iterable[Row], seeds: Iterable[int], label: str = "") -> list[Cell]:
    """Every row with every seed, all seeds of the first row first.

    All cells have the same number of threads, so that they have the same bits whatever runs beside them.

    Raises:
        UserError: a setting of a row is unknown, or has an invalid value.
    """
    evaluation = config.evaluation.model_copy(update={"every": 1})
    fixed = config.model_copy(update={"evaluation": evaluation, "threads": config.threads or 1})
    return [
        Cell(row.method, seed, own.model_copy(update={"seed": seed}), label, row.name)
        for row in rows
        for own in [row.config(fixed)]
        for seed in seeds
    ]


def compute(cells: list[Cell], folder: Path, jobs: int | None, progress: Update) -> dict[str, str]:
    """Compute cells, in their order; each becomes a file, and one that cannot be computed does not stop the others.

    Args:
        folder: of the files.
        jobs: cells at once; None: as many as there are processors and memory for, after the first cell has shown how
            much one takes.

    Returns:
        Why cells cannot be computed, by the names of their files: a method may need more room than any client has.
    """
    runs = _Runs(folder, jobs, progress)
    runs.all_of(cells)
    return runs.failed


def _context() -> BaseContext:
    """Makes the processes of cells. Where the system can, they are forks of one that has imported everything."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hfedmoe.compare.worker"])
    return context


def _compute(config: str, out: str, errors: str) -> None:
    """What the process of a cell does."""
    from hfedmoe.compare.worker import work

    work(Path(config), Path(out), Path(errors))


@dataclass
class _Run:
    cell: Cell
    process: BaseProcess
    errors: Path
    started: float


class _Runs:
    def __init__(self, folder: Path, jobs: int | None, progress: Update) -> None:
        self.folder, self.jobs, self.done, self.progress = folder, jobs, 0, progress
        self.failed: dict[str, str] = {}
        self.seconds: list[float] = []
        self.peak = 0
        self.memory, _ = available_memory()
        self._context = _context()

    def all_of(self, cells: list[Cell]) -> None:
        waiting, running = list(cells), list[_Run]()
        with tempfile.TemporaryDirectory() as scratch:
            try:
                while waiting or running:
                    while waiting and len(running) < self._room():
                        running.append(self._start(waiting.pop(0), Path(scratch)))
                    for run in [run for run in running if run.process.exitcode is not None]:
                        running.remove(run)
                        self._finish(run)
                    self._report(running, len(waiting))
                    time.sleep(POLL_S)
            finally:
                for run in running:
                    run.process.kill()
                    run.process.join()

    def _room(self) -> int:
        if self.jobs is not None:
            return self.jobs
        if not self.peak:
            return 1
        return max(1, min(usable_cores(), int(self.memory * ROOM / self.peak)))

    def _start(self, cell: Cell, scratch: Path) -> _Run:
        config, errors = scratch / f"{cell.file}.config", scratch / f"{cell.file}.errors"
        config.write_text(cell.config.model_dump_json(), encoding="utf-8")
        arguments = str(config), str(self.folder / cell.file), str(errors)
        process = self._context.Process(target=_compute, args=arguments)  # type: ignore[attr-defined]
        process.start()
        return _Run(cell, process, errors, time.monotonic())

    def _finish(self, run: _Run) -> None:
        self.done += 1
        if run.process.exitcode != 0:
            said = run.errors.read_text(encoding="utf-8", errors="replace") if run.errors.is_file() else ""
            lines = said.strip().splitlines() or [f"its process ended with code {run.process.exitcode}"]
            self.failed[run.cell.file] = lines[-1].removeprefix("error: ")
            return
        self.seconds.append(time.monotonic() - run.started)
        self.peak = max(self.peak, Result.read(self.folder / run.cell.file).peak_bytes)

    def _report(self, running: list[_Run], waiting: int) -> None:
        left = None
        if self.seconds:
            mean, now = sum(self.seconds) / len(self.seconds), time.monotonic()
            left = sum(max(0.0, mean - (now - run.started)) for run in running) + mean * waiting
            left /= max(1, len(running))
        names = ", ".join(f"{run.cell.shown} {run.cell.seed}" for run in running)
        self.progress(self.done, names or "cells", left)
