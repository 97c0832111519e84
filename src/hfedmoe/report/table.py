"""Tables of plain text."""

WIDTH = 120
"""Maximum characters per line in reports."""
GAP = "  "


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table with minimal column widths; the first column is left-aligned, the others right-aligned."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return [
        GAP.join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    ]


def tables(head: list[str], rows: list[list[str]], width: int = WIDTH) -> list[list[str]]:
    """Like `table`, split into tables that fit `width`; each has the first column and at least one more."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    groups: list[list[int]] = []
    room = 0
    for column in range(1, len(head)):
        needed = len(GAP) + widths[column]
        if not groups or needed > room:
            groups.append([])
            room = width - widths[0]
        groups[-1].append(column)
        room -= needed
    return [table(*_columns([0, *group], head, rows)) for group in groups]


def _columns(chosen: list[int], head: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    return [head[column] for column in chosen], [[row[column] for column in chosen] for row in rows]
