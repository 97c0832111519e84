"""A browser's part in a live page, without a browser: it loads the page, listens, and loads it again when told."""

import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hfedmoe.report.page import watching


def shown(page: str) -> str:
    """The state of the run's folder that a page shows, as its script sends it."""
    return page.partition('"events?seen=')[2].partition('"')[0]


class Visitor:
    """Watches a live page from another thread, until it is told that the run has ended."""

    def __init__(self) -> None:
        self.pages: list[str] = []
        self.told_the_end = False
        self._thread: threading.Thread | None = None

    def watch(self, address: str) -> None:
        """Begin."""
        self._thread = threading.Thread(target=self._watch, args=(address,), daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Wait until it has seen the end."""
        assert self._thread is not None
        self._thread.join(60)

    def _watch(self, address: str) -> None:
        while not self.told_the_end:
            with urllib.request.urlopen(address, timeout=60) as answer:
                self.pages.append(answer.read().decode())
            with urllib.request.urlopen(f"{address}events?seen={shown(self.pages[-1])}", timeout=60) as events:
                told = next(line for line in events if line.startswith((b"data: round", b"event: end")))
            self.told_the_end = told.startswith(b"event: end")


@contextmanager
def visiting() -> Iterator[Visitor]:
    """A visitor of the page of a run with `--live` that is made during the block."""
    visitor, served = Visitor(), watching.served

    @contextmanager
    def with_visitor(run: Path, host: str, port: int, grace_s: float = 0.0) -> Iterator[str]:
        with served(run, host, port, grace_s) as address:
            visitor.watch(address)
            yield address

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watching, "served", with_visitor)
        yield visitor
    visitor.leave()
