"""Git LFS pointers: small text files in a clone, in place of large files that are not downloaded yet."""

from pathlib import Path

START = b"version https://git-lfs.github.com/spec/v1"
IS_POINTER = "is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
LONGEST = 1024
"""Maximum size of a pointer in bytes, from the specification."""


def is_pointer(data: bytes) -> bool:
    """Whether the content of a file begins like a pointer."""
    return data.startswith(START)


def pointer_in(path: Path) -> str | None:
    """One line about the file at `path`, or the first file in that folder, that is a pointer; None: there is none."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        if file.is_file() and file.stat().st_size <= LONGEST:
            with file.open("rb") as stream:
                if is_pointer(stream.read(len(START))):
                    return f"{file}: {IS_POINTER}"
    return None
