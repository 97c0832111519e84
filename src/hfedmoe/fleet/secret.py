"""Files that only their owner may read."""

import os
from pathlib import Path

from hfedmoe.errors import UserError


def write_secret(path: Path, content: bytes) -> None:
    """Write a new file with mode 0600. Raises UserError if it exists or cannot be written."""
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            stream.write(content)
    except FileExistsError:
        raise UserError(f"{path}: exists already; move it away first") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
