"""One line on standard error that shows how far something is, and the minutes that are left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Update = Callable[[int, str, float | None], None]
"""(number done, what is going on, seconds left or None)."""


@contextmanager
def counted(total: int, begins: str) -> Iterator[Update]:
    """Show a bar of `total` parts during the block; `begins`: what is going on before the first update."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(begins, total=total, left="")

        def update(done: int, going: str, left: float | None) -> None:
            text = "" if left is None else f"{left / 60:.0f} min left"
            bar.update(task, completed=done, description=going, left=text)

        yield update
