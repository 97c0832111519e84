"""How fast the layer is, and how much memory it needs, beside all others (`gpu_arms`), one after the other."""

import time
from typing import Any

from benchmarks.gpu_arms import ARMS, ON_GPU_ONLY
from benchmarks.gpu_process import rows_of

CELLS = ("olmoe:8192", "qwen3:8192", "olmoe:2048", "qwen3:2048")
"""In their order of importance."""
DRY_CELLS = ("tiny:128", "tiny:32")
LEAST_SECONDS = 20.0
"""An arm with less time than this is left out: most of it is the start of the process."""
USUAL_SECONDS = 35.0
"""What an arm gets at least, if there is as much left."""
GRACE_SECONDS = 20.0
"""A process that does not stop by itself gets this much longer."""
CLOSE = {"16bit": 0.02, "8bit": 0.05, "4bit": 0.15}
"""How far the norms of the output may be from those of `ours`, relative; others compute the same function."""
Row = dict[str, Any]


def measure(minutes: float, dry: bool, arms: tuple[str, ...] = tuple(ARMS)) -> list[Row]:
    """One row per arm and cell; rows without `ms` say why in `error` or `left_out`."""
    cells = DRY_CELLS if dry else CELLS
    until = time.monotonic() + 60 * minutes
    rows: list[Row] = []
    for place, arm in enumerate(arms):
        left = until - time.monotonic()
        # An arm may take more than its share: those before it took less, or those after it are less important.
        share = 120.0 if dry else min(left, max(USUAL_SECONDS, 2 * left / (len(arms) - place)))
        if dry and arm in ON_GPU_ONLY:
            new = _absent(arm, cells, ON_GPU_ONLY[arm])
        elif share < LEAST_SECONDS and not dry:
            new = _absent(arm, cells, f"no time left: {share:.0f} s")
        else:
            new = _run(arm, cells, share, dry)
        for row in new:
            print(line(row), flush=True)
        rows += new
    return rows


def _run(arm: str, cells: tuple[str, ...], seconds: float, dry: bool) -> list[Row]:
    arguments = [arm, "--cells", ",".join(cells), "--seconds", f"{seconds - 8:.1f}", *(["--dry"] if dry else [])]
    rows, failure = rows_of("benchmarks.gpu_arms", arguments, seconds + GRACE_SECONDS, ARMS[arm].environment)
    done = {f"{row['shape']}:{row['tokens']}" for row in rows}
    missing = tuple(cell for cell in cells if cell not in done)
    if failure is not None and not any("error" in row for row in rows):
        return rows + [row | {"error": failure} for row in _absent(arm, missing, "")]
    return rows + _absent(arm, missing, "no time left")


def _absent(arm: str, cells: tuple[str, ...], why: str) -> list[Row]:
    parts = [cell.split(":") for cell in cells]
    return [{"arm": arm, "shape": name, "tokens": int(tokens), "left_out": why} for name, tokens in parts]


def line(row: Row) -> str:
    """A row for people."""
    start = f"{row['shape']:5} {row['tokens']:4} {row['arm']:12}"
    if "ms" not in row:
        return f"{start} {row['error'].strip().splitlines()[-1][:90] if 'error' in row else row['left_out']}"
    text = f"{start} {row['ms']:8.3f} ms {row['tflops']:6.1f} TFLOP/s"
    if "all_ms" in row:
        return f"{text} thin {row['thin_ms']:.3f} outer {row['outer_ms']:.3f} all {row['all_ms']:.3f} ms"
    text += f" host {row['host_ms']:7.3f}"
    if "total_bytes" in row:
        text += f" GB {row['total_bytes'] / 1e9:6.2f} over weights {row['peak_bytes'] / 1e9:6.2f}"
    if "optimizer_ms" in row:
        text += f" adamw {row['optimizer_ms']:6.3f}"
    return f"{text} x{row['repeats']}"


def summary(rows: list[Row]) -> dict[str, Row]:
    """The ratios that the goals are about, by cell; only those whose both sides were measured."""
    cells = dict.fromkeys(f"{row['shape']} {row['tokens']}" for row in rows)
    return {cell: _ratios({row["arm"]: row for row in rows if _is_of(row, cell)}) for cell in cells}


def _is_of(row: Row, cell: str) -> bool:
    return "ms" in row and f"{row['shape']} {row['tokens']}" == cell


def _ratios(by_arm: dict[str, Row]) -> Row:
    wanted = {
        "ours / stock frozen (<= 1.15)": ("ours", "ms", "stock frozen", "ms"),
        "ours / ours frozen": ("ours", "ms", "ours frozen", "ms"),
        "ours frozen / stock frozen": ("ours frozen", "ms", "stock frozen", "ms"),
        "ours / peft (<= 1)": ("ours", "ms", "peft", "ms"),
        "ours / e4b 16bit (<= 1)": ("ours", "ms", "e4b 16bit", "ms"),
        "ours 4bit / e4b nf4 (<= 1)": ("ours 4bit", "ms", "e4b nf4", "ms"),
        "ours 4bit / e4b nf4 mm": ("ours 4bit", "ms", "e4b nf4 mm", "ms"),
        "ours 4bit / e4b nf4 f32": ("ours 4bit", "ms", "e4b nf4 f32", "ms"),
        "ours store / ours": ("ours store", "ms", "ours", "ms"),
        "base products / ours (>= 0.7 at 8192)": ("bare", "ms", "ours", "ms"),
        "base and LoRA products / ours": ("bare", "all_ms", "ours", "ms"),
        "base products / ours frozen": ("bare", "ms", "ours frozen", "ms"),
        "base products / stock frozen": ("bare", "ms", "stock frozen", "ms"),
        "memory: ours / peft (<= 0.6)": ("ours", "total_bytes", "peft", "total_bytes"),
        "memory over weights: ours / peft": ("ours", "peak_bytes", "peft", "peak_bytes"),
        "memory: ours / stock frozen": ("ours", "total_bytes", "stock frozen", "total_bytes"),
        "memory: ours 4bit / e4b nf4": ("ours 4bit", "total_bytes", "e4b nf4", "total_bytes"),
        "adamw: ours / peft": ("ours", "optimizer_ms", "peft", "optimizer_ms"),
    }
    return {
        name: by_arm[one][key] / by_arm[other][divisor]
        for name, (one, key, other, divisor) in wanted.items()
        if key in by_arm.get(one, {}) and divisor in by_arm.get(other, {})
    }


def failures(rows: list[Row]) -> list[str]:
    """What went wrong: errors, and arms whose output or gradient differs from ours."""
    found = [f"{row['arm']} {row['shape']} {row['tokens']}: {row['error']}" for row in rows if "error" in row]
    for row in rows:
        if "norm" not in row:
            continue
        same = (own for own in rows if own["arm"] == "ours" and "norm" in own)
        own = next((own for own in same if (own["shape"], own["tokens"]) == (row["shape"], row["tokens"])), row)
        for key in ("norm", "grad_norm"):
            if abs(row[key] / own[key] - 1) > CLOSE[ARMS[row["arm"]].precision]:
                found.append(
                    f"{row['arm']} {row['shape']} {row['tokens']}: {key} {row[key]:.4g}, that of ours {own[key]:.4g}"
                )
    return found


def table(rows: list[Row], ratios: dict[str, Row]) -> list[str]:
    """Rows and ratios for people, cell by cell."""
    cells = dict.fromkeys((row["shape"], row["tokens"]) for row in rows)
    lines = [line(row) for cell in cells for row in rows if (row["shape"], row["tokens"]) == cell]
    names = dict.fromkeys(name for own in ratios.values() for name in own)
    lines.append("ratios: " + " | ".join(ratios))
    for name in names:
        values = (own.get(name) for own in ratios.values())
        lines.append(" ".join("    -" if value is None else f"{value:5.2f}" for value in values) + f"  {name}")
    return lines
