"""Expected errors: bad input that the user can correct, and training that fails."""

INTERRUPTED = 2
"""The exit code after Ctrl-C."""


class UserError(Exception):
    """Bad input: a config, data set, checkpoint, folder or network address that the user can correct.

    The message is one line that names the thing at fault and the way out. The command line prints it without a
    traceback and exits with code 2.
    """


class DiskError(UserError):
    """A file cannot be written: the disk is full, or the owner does not allow it."""


class TrainingError(RuntimeError):
    """The local training cannot give a usable update; the message says why."""


class OwnDataError(UserError):
    """Rows of a device do not fit the run. The text is for its owner only; others may be told only `count`.

    Args:
        text: names file, line and cell.
        count: number of rows that do not fit, as far as they were counted.
    """

    def __init__(self, text: str, count: int = 1) -> None:
        super().__init__(text)
        self.count = count
