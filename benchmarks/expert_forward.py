"""Fine-tuning experts: our expert forward compared with stock transformers and PEFT, over a grid of shapes.

    python -m benchmarks.expert_forward [--quick] [--seconds 1.0] [--rows FILE] [--json FILE]

A cell is a number of experts, a top-k, a number of tokens, a resident share and a precision. Every cell measures a
training step of the same small OLMoE (see `expert_step`). The variants run one after the other, in separate processes:

* LoRA (rank 8) on the experts: ours, and PEFT's `target_parameters` on each stock experts implementation;
* frozen experts: each stock implementation, and ours;
* full training of the experts: ours, and each stock implementation (PEFT has none).

Stock models and PEFT cannot leave experts out, so they use the whole model in cells with a resident share below 100 %;
`median_speedup_same_experts` compares with PEFT on a model that has only the resident number of experts. Peak memory is
the operating system's figure for the process, with imports. batched_mm copies the weights once per (token, expert)
pair, so it is left out above 128 pairs. A variant is not repeated if its first step takes five times the best step.

Single expert layers are also compared with the bare matrix products of the same shapes (see `expert_layers`). On
processors without 16-bit products, our forward computes bfloat16 cells in float32. PEFT computes them in bfloat16 and
takes minutes, so these cells are few and small there. There are medians for all cells, for float32 and for bfloat16.
"""

import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import expert_layers, expert_step
from benchmarks.common import machine, parser, report
from benchmarks.expert_step import LENGTH, STOCK, Cell
from benchmarks.forked import in_forked_process

TIMEOUT_S = 900.0
BATCHED_PAIRS = 128
HOPELESS = 5.0
"""A variant is not repeated if its first step takes this many times the best step of the others."""


def cells(quick: bool) -> Iterator[Cell]:
    """The grid with LoRA."""
    top_ks, tokens = ((2,), (64, 512)) if quick else ((1, 2, 8), (64, 512, 2048))
    for dtype in ("float32", "bfloat16") if _multiplies_bfloat16() else ("float32",):
        for experts in (16, 64):
            for top_k in top_ks:
                for number in tokens:
                    yield from _shares(experts, top_k, number, dtype)
    if not _multiplies_bfloat16():
        for number in (64,) if quick else (64, 256):
            yield from _shares(16, 2, number, "bfloat16")


def full_cells(quick: bool) -> Iterator[Cell]:
    """The grid with full training."""
    for experts in (16, 64):
        for number in (64,) if quick else (64, 512, 2048):
            yield from _shares(experts, 2, number, "float32")


def _multiplies_bfloat16() -> bool:
    import torch

    from hfedmoe.moe.compact import multiplies_16_bit

    return multiplies_16_bit(torch.device("cpu"), torch.bfloat16)


def _shares(experts: int, top_k: int, tokens: int, dtype: str) -> Iterator[Cell]:
    for share in (1.0, 0.5, 0.25):
        if round(experts * share) >= top_k:
            yield Cell(experts, top_k, tokens, dtype, share)


class Bench:
    """Measures variants in cells; each result is kept."""

    def __init__(self, seconds: float, folder: Path) -> None:
        self.seconds, self.folder = seconds, folder
        self._known: dict[tuple[Cell, str], dict[str, Any] | None] = {}
        self._layers: dict[Cell, dict[str, float]] = {}

    def checkpoint(self, cell: Cell) -> str:
        """The folder of the model's checkpoint; written at the first call."""
        folder = self.folder / f"{cell.experts}-{cell.dtype}"
        if not folder.exists():
            in_forked_process(expert_step.write, str(folder), cell.experts, cell.dtype, timeout_s=TIMEOUT_S)
        return str(folder)

    def step(self, cell: Cell, variant: str, hopeless_s: float = math.inf) -> dict[str, Any] | None:
        """Median seconds of a step and peak bytes; None if it did not fit or took too long."""
        if "batched" in variant and cell.tokens * cell.top_k > BATCHED_PAIRS:
            return None
        key = (cell, variant)
        if key not in self._known:
            folder = self.checkpoint(cell)
            place = (cell.experts, cell.top_k, cell.tokens, cell.dtype, cell.share)
            measured = in_forked_process(
                expert_step.measure, folder, *place, variant, self.seconds, hopeless_s, timeout_s=TIMEOUT_S
            )
            if measured is not None:
                measured["pass_s"] = statistics.median(measured["passes"])
                measured["step_s"] = measured["pass_s"] + statistics.median(measured["updates"])
            self._known[key] = measured
        return self._known[key]

    def best(self, cell: Cell, variants: list[str]) -> dict[str, Any]:
        """The fastest of some variants, with its name."""
        fastest: dict[str, Any] = {"step_s": math.inf}
        for variant in variants:
            found = self.step(cell, variant, HOPELESS * fastest["step_s"])
            if found is not None and found["step_s"] < fastest["step_s"]:
                fastest = {"name": variant, **found}
        return fastest

    def layers(self, cell: Cell) -> dict[str, float]:
        """Seconds of an expert layer and of its matrix products, see `expert_layers`."""
        if cell not in self._layers:
            arguments = (cell.experts, cell.top_k, cell.tokens, cell.dtype, self.seconds)
            measured = in_forked_process(expert_layers.measure, *arguments, timeout_s=TIMEOUT_S)
            assert measured is not None
            self._layers[cell] = measured
        return self._layers[cell]

    def compare(self, cell: Cell) -> dict[str, Any]:
        """The row of one LoRA cell."""
        whole = Cell(cell.experts, cell.top_k, cell.tokens, cell.dtype)
        alike = Cell(cell.resident, cell.top_k, cell.tokens, cell.dtype)
        ours, own_frozen = self.step(cell, "ours"), self.step(cell, "ours frozen")
        assert ours is not None
        assert own_frozen is not None
        peft = self.best(whole, [f"peft {name}" for name in STOCK])
        peft_alike = self.best(alike, [f"peft {name}" for name in STOCK])
        frozen = min(self.best(alike, [f"frozen {name}" for name in STOCK])["step_s"], own_frozen["step_s"])
        layers = self.layers(alike)
        return {
            **_place(cell),
            "ours s": ours["step_s"],
            "ours MB": ours["peak_bytes"] / 1e6,
            "best PEFT": peft["name"].removeprefix("peft "),
            "speedup": peft["step_s"] / ours["step_s"],
            "memory": ours["peak_bytes"] / peft["peak_bytes"],
            "speedup same experts": peft_alike["step_s"] / ours["step_s"],
            "vs frozen": ours["step_s"] / frozen,
            "share of limit": (layers["base_products"] + layers["thin_products"]) / layers["layer"],
            "share of base limit": layers["base_products"] / layers["layer"],
        }

    def compare_full(self, cell: Cell) -> dict[str, Any]:
        """The row of one cell with full training."""
        whole = Cell(cell.experts, cell.top_k, cell.tokens, cell.dtype)
        ours, stock = self.step(cell, "ours full"), self.best(whole, [f"full {name}" for name in STOCK])
        eager = self.step(whole, "full eager")
        assert ours is not None
        return {
            **_place(cell),
            "ours pass s": ours["pass_s"],
            "ours s": ours["step_s"],
            "ours MB": ours["peak_bytes"] / 1e6,
            "best stock": stock["name"].removeprefix("full "),
            "speedup": stock["step_s"] / ours["step_s"],
            "memory": ours["peak_bytes"] / stock["peak_bytes"],
            "speedup vs eager": None if eager is None else eager["step_s"] / ours["step_s"],
        }


def _place(cell: Cell) -> dict[str, Any]:
    return {
        "experts": cell.experts,
        "top-k": cell.top_k,
        "tokens": cell.tokens,
        "dtype": cell.dtype,
        "resident": f"{cell.share:.0%}",
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--quick", action="store_true", help="a small part of the grid")
    arguments.add_argument("--seconds", type=float, default=1.0, help="repeat each step this long, after a first one")
    arguments.add_argument("--rows", type=Path, metavar="FILE", help="keep rows here; rows found here are not measured")
    options = arguments.parse_args()
    assert all(cell.tokens % LENGTH == 0 for cell in cells(options.quick))
    rows = Rows(options.rows)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.seconds, Path(folder))
        lora = [rows.get("lora", cell, bench.compare) for cell in cells(options.quick)]
        full = [rows.get("full", cell, bench.compare_full) for cell in full_cells(options.quick)]
    _report(lora, full, options.json)


class Rows:
    """Rows measured so far, kept in a file with one JSON object per line, so that an interrupted run can continue."""

    def __init__(self, file: Path | None) -> None:
        self._file, self._known = file, {}
        here = machine()
        if file is not None and file.exists():
            first, *rows = map(json.loads, file.read_text().splitlines())
            if first != here:
                sys.exit(f"{file}: has rows of another machine or other versions; use a new file")
            self._known = {(row["kind"], *_place_of(row)): row for row in rows}
        elif file is not None:
            file.write_text(json.dumps(here) + "\n")

    def get(self, kind: str, cell: Cell, measure: Callable[[Cell], dict[str, Any]]) -> dict[str, Any]:
        """The row of a cell, measured now if it is not known."""
        key = (kind, *_place(cell).values())
        if key not in self._known:
            self._known[key] = {"kind": kind, **measure(cell)}
            _show(self._known[key])
            if self._file is not None:
                with self._file.open("a") as file:
                    file.write(json.dumps(self._known[key]) + "\n")
        return {column: value for column, value in self._known[key].items() if column != "kind"}


def _place_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[column] for column in _place(Cell(1, 1, 1)))


def _show(row: dict[str, Any]) -> None:
    cells = (f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
    print("  ".join(cells), file=sys.stderr, flush=True)


def _report(lora: list[dict[str, Any]], full: list[dict[str, Any]], file: Path | None) -> None:
    report(full, {}, None)
    single = [row for row in lora if row["dtype"] == "float32"]
    half = [row for row in lora if row["dtype"] == "bfloat16"]
    report(
        lora,
        {
            "cells": len(lora),
            "median_speedup_vs_best_peft": _median(lora, "speedup"),
            "worst_speedup_vs_best_peft": min(row["speedup"] for row in lora),
            "median_memory_vs_best_peft": _median(lora, "memory"),
            "median_share_of_matmul_limit": _median(lora, "share of limit"),
            "median_step_vs_frozen": _median(lora, "vs frozen"),
            "median_speedup_float32": _median(single, "speedup"),
            "median_speedup_bfloat16": _median(half, "speedup"),
            "median_speedup_same_experts": _median(lora, "speedup same experts"),
            "worst_speedup_same_experts": min(row["speedup same experts"] for row in lora),
            "median_share_of_base_products": _median(lora, "share of base limit"),
            "median_full_speedup_vs_best_stock": _median(full, "speedup"),
            "worst_full_speedup_vs_best_stock": min(row["speedup"] for row in full),
            "median_full_memory_vs_best_stock": _median(full, "memory"),
            **_with_share(lora),
            **_full_growth(full),
        },
        file,
        {"full": full},
    )


def _median(rows: list[dict[str, Any]], column: str) -> float:
    return statistics.median(row[column] for row in rows)


def _with_share(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Step time and memory at 25 % and 50 % residency, divided by those of the whole model; medians over cells."""
    whole = {
        (row["experts"], row["top-k"], row["tokens"], row["dtype"]): row for row in rows if row["resident"] == "100%"
    }
    found = {}
    for share in ("50%", "25%"):
        pairs = [
            (row, whole[row["experts"], row["top-k"], row["tokens"], row["dtype"]])
            for row in rows
            if row["resident"] == share
        ]
        for column, name in (("ours s", "time"), ("ours MB", "memory")):
            found[f"{name}_at_{share.rstrip('%')}_percent"] = statistics.median(a[column] / b[column] for a, b in pairs)
    return found


def _full_growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How much longer forward and backward of full training take with 64 than with 16 experts, at the most tokens."""
    most = max(row["tokens"] for row in rows)
    at = {row["experts"]: row["ours pass s"] for row in rows if row["tokens"] == most and row["resident"] == "100%"}
    return {"full_pass_64_over_16_experts": at[64] / at[16]}


if __name__ == "__main__":
    main()
