"""The table of a comparison, as Markdown and CSV."""

import csv
import io
from statistics import fmean

from hfedmoe.compare.cells import Result
from hfedmoe.compare.merits import COLUMNS, Interval, compared, final, interval

PERCENT = {"accuracy", "best accuracy", "macro-F1", "worst client", "median client", "best client"}
BYTES = {"bytes to target", "bytes per round", "largest client"}


def target_of(results: list[Result], reference: str) -> float:
    """The target accuracy unless one is given: 95 % of what the reference reaches at its end, the mean over seeds."""
    found = [value for result in results if result.method == reference and (value := final(result)) is not None]
    return 0.95 * fmean(found) if found else 0.0


def values(results: list[Result], target: float) -> dict[str, dict[str, tuple[Interval | None, int]]]:
    """Of each method and column: the interval over the seeds that have a value, and the number of all seeds."""
    found: dict[str, dict[str, tuple[Interval | None, int]]] = {}
    for name in dict.fromkeys(result.method for result in results):
        own = [result for result in results if result.method == name]
        found[name] = {
            column: (interval([value for result in own if (value := of(result, target)) is not None]), len(own))
            for column, of in COLUMNS.items()
        }
    return found


def as_markdown(results: list[Result], reference: str, target: float) -> str:
    """The table, the tests against the reference, and what the cells were computed with."""
    rows = values(results, target)
    lines = [f"| method | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for name, row in rows.items():
        lines.append(f"| `{name}` | {' | '.join(_cell(column, *row[column]) for column in COLUMNS)} |")
    seeds = sorted({result.seed for result in results})
    lines += ["", f"Means over seeds {', '.join(map(str, seeds))} with 95 % intervals. Target accuracy: {target:.1%}."]
    lines += [
        "A number of seeds in brackets: only so many reached the target. *largest client*: predicted peak memory. "
        "*clients*: valid updates per round.",
        "",
        f"| against `{reference}` | difference of accuracy | p (paired t test, Holm) |",
        "|---|---|---|",
    ]
    for found in compared(results, reference):
        p = "-" if found.p is None else f"{found.p:.3f}"
        lines.append(f"| `{found.method}` | {_points(found.difference)} | {p} |")
    versions = sorted({result.code for result in results})
    machines = sorted({f"{result.machine['processor']}, {result.machine['threads']} thread(s)" for result in results})
    lines += ["", f"hfedmoe {', '.join(versions)}; {'; '.join(machines)}."]
    return "\n".join(lines) + "\n"


def as_csv(results: list[Result], target: float) -> str:
    """One line per method, seed and column."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["method", "seed", "digest", "column", "value"])
    for result in results:
        for column, of in COLUMNS.items():
            value = of(result, target)
            writer.writerow([result.method, result.seed, result.digest, column, "" if value is None else repr(value)])
    return out.getvalue()


def _cell(column: str, found: Interval | None, seeds: int) -> str:
    if found is None:
        return "-"
    number = f" ({found.number})" if found.number < seeds else ""
    if column in PERCENT:
        half = "" if found.half is None else f" ± {100 * found.half:.1f}"
        return f"{100 * found.mean:.1f}{half}{number}"
    if column in BYTES:
        return f"{found.mean / 1e6:.2f} MB{number}"
    if column == "FLOPs to target":
        return f"{found.mean:.2e}{number}"
    return f"{found.mean:.1f}{number}"


def _points(found: Interval) -> str:
    half = "" if found.half is None else f" ± {100 * found.half:.1f}"
    return f"{100 * found.mean:+.1f}{half}"
