"""The tables of a comparison, as Markdown and CSV."""

import csv
import io
from collections.abc import Sequence
from statistics import fmean

from hfedmoe.compare.cells import Result
from hfedmoe.compare.merits import COLUMNS, Comparison, Interval, compared, final, interval
from hfedmoe.compare.stored import Block

PERCENT = {
    "accuracy",
    "best accuracy",
    "macro-F1",
    "worst client",
    "median client",
    "best client",
    "worst client, own prior",
    "median client, own prior",
}
BYTES = {"bytes to target", "bytes per round", "peak memory"}
NOTES = (
    "*(n of m)*: n of m seeds reached the target; the mean is over these. *peak memory*: predicted, of the largest "
    "client. *own prior*: each client adds the logarithm of its label shares to the scores. *bytes per round*: both "
    "ways, all clients. *clients*: valid updates per round. *difference*: of the final accuracy, in points, the mean "
    "over seeds with its 95 % interval."
)


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


def as_markdown(blocks: Sequence[Block], reference: str, targets: Sequence[float], on: str = "test") -> str:
    """Of each point a table and the tests against the reference, then what the cells were computed with.

    Args:
        targets: the target accuracy of each block.
        on: "test" or "validation": the rows of the results' accuracies.
    """
    lines = [f"Accuracies are on {_rows(blocks, on)}. {NOTES}", ""]
    for block, target in zip(blocks, targets, strict=True):
        tests = compared([*block.results, *block.others], reference)
        lines += [f"## {block.point.label}", ""] if block.point.label else []
        lines += [*_table(block, target), "", *_tests(tests, reference)]
    results = [result for block in blocks for result in [*block.results, *block.others]]
    versions = [f"hfedmoe {code}: {_by_method(results, code)}" for code in sorted({result.code for result in results})]
    machines = sorted({f"{result.machine['processor']}, {result.machine['threads']} thread(s)" for result in results})
    bases = sorted({(str(result.config.get("model")), result.base) for result in results if result.base})
    if len(bases) > len({name for name, _ in bases}):
        lines += [f"**Base models of one name differ**: {', '.join(digest[:12] for _, digest in bases)}.", ""]
    return "\n".join([*lines, *(f"{line}  " for line in versions), f"{'; '.join(machines)}."]) + "\n"


def _by_method(results: Sequence[Result], code: str) -> str:
    """The cells that a version of the code computed: methods with their seeds."""
    seeds: dict[str, set[int]] = {}
    for result in results:
        if result.code == code:
            seeds.setdefault(result.method, set()).add(result.seed)
    return "; ".join(f"{name} {', '.join(map(str, sorted(own)))}" for name, own in seeds.items())


def _rows(blocks: Sequence[Block], on: str) -> str:
    counts = {r.test_rows if on == "test" else r.watch_rows for block in blocks for r in block.results} - {0}
    number = f"{' or '.join(map(str, sorted(counts)))} " if counts else ""
    if on == "test":
        return f"the {number}held-out test rows"
    return f"the {number}validation rows (`evaluation.watch_rows`), which are not among the test rows"


def _table(block: Block, target: float) -> list[str]:
    lines = [f"| method | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for name, row in values(block.results, target).items():
        lines.append(f"| `{name}` | {' | '.join(_cell(column, *row[column]) for column in COLUMNS)} |")
    seeds = sorted({result.seed for result in block.results})
    lines += ["", f"Means over seeds {', '.join(map(str, seeds))} with 95 % intervals. Target accuracy: {target:.1%}."]
    if block.missing:
        lines.append(f"Without stored figures: {', '.join(block.missing)}.")
    return lines


def _tests(group: Sequence[Comparison], reference: str) -> list[str]:
    if not group:
        return []
    tests = sum(found.p is not None for found in group)
    head = f"| against `{reference}` | difference | p (paired t test, Holm over {tests}) | pairs |"
    lines = [head, "|---|---|---|---|"]
    for found in group:
        p = "-" if found.p is None else f"{found.p:.3f}"
        mixed = f" ({found.mixed} of another machine, code or base)" if found.mixed else ""
        lines.append(f"| `{found.method}` | {_points(found.difference)} | {p} | {found.difference.number}{mixed} |")
    return [*lines, ""]


def as_csv(blocks: Sequence[Block], reference: str, targets: Sequence[float]) -> str:
    """One line per point, method, seed and column; then, over all seeds, the tests against the reference."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["point", "method", "seed", "digest", "code", "column", "value"])
    for block, target in zip(blocks, targets, strict=True):
        label = block.point.label
        for result in block.results:
            for column, of in COLUMNS.items():
                cell = (result.seed, result.digest, result.code)
                writer.writerow([label, result.method, *cell, column, _exact(of(result, target))])
        for found in compared([*block.results, *block.others], reference):
            figures = {"difference": found.difference.mean, "half of its interval": found.difference.half, "p": found.p}
            for column, value in figures.items():
                writer.writerow([label, found.method, "", "", "", f"{column}, against {reference}", _exact(value)])
    return out.getvalue()


def _exact(value: float | None) -> str:
    return "" if value is None else repr(value)


def _cell(column: str, found: Interval | None, seeds: int) -> str:
    if found is None:
        return f"- (0 of {seeds})" if column.endswith("to target") else "-"
    reached = f" ({found.number} of {seeds})" if found.number < seeds else ""
    if column in PERCENT:
        return f"{_spread(found, 100, '.1f')}{reached}"
    if column in BYTES:
        return f"{_spread(found, 1e-6, '.2f')} MB{reached}"
    return f"{_spread(found, 1, '.2e' if column == 'FLOPs to target' else '.1f')}{reached}"


def _spread(found: Interval, scale: float, form: str) -> str:
    half = f" ± {scale * found.half:{form}}" if found.half is not None else ""
    return f"{scale * found.mean:{form}}{half}"


def _points(found: Interval) -> str:
    half = "" if found.half is None else f" ± {100 * found.half:.1f}"
    return f"{100 * found.mean:+.1f}{half}"
