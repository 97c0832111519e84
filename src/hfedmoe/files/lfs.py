"""Git LFS pointers: small texts that stand in a clone for files which nobody has fetched yet."""

from pathlib import Path

START = b"version https://git-lfs.github.com/spec/v1"
LONGEST = 1024
"""Bytes of a pointer at most, by the specification."""


def is_pointer(data: bytes) -> bool:
    """Whether the beginning of a file is that of a pointer."""
    return data.startswith(START)


def pointer_in(path: Path) -> str | None:
    """One line about a file, or about the first of a folder's files, that is a pointer; None if there is none."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        if file.is_file() and file.stat().st_size <= LONGEST:
            with file.open("rb") as stream:
                if is_pointer(stream.read(len(START))):
                    return f"{file}: is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
    return None
