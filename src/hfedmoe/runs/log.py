"""The log file of a run, with details of errors, such as the traceback of a failed simulated client."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = "log.txt"


@contextmanager
def logging_to(folder: Path) -> Iterator[None]:
    """Write warnings and errors of hfedmoe to the run's log during the block; the first one creates the file."""
    handler = logging.FileHandler(folder / NAME, encoding="utf-8", delay=True)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("hfedmoe")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
