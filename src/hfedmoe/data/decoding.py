"""Decode the bytes of a file as text; anything that is not text is refused in one line that says what it is."""

import codecs
import gzip
import zlib
from dataclasses import dataclass

from hfedmoe.config import DataConfig
from hfedmoe.errors import UserError
from hfedmoe.files.lfs import is_pointer

MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte-order marks and the encoding that each one means."""
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
KINDS = (
    (b"PK\x03\x04", "a spreadsheet (xlsx, ods) or a zip archive; save the sheet as CSV, or unpack the archive"),
    (b"\xd0\xcf\x11\xe0", "an old Excel file; save the sheet as CSV"),
    (b"%PDF", "a PDF; save its texts as CSV or JSONL"),
    (b"SQLite format 3", "an SQLite database; export the table as CSV"),
    (b"BZh", "compressed with bzip2; unpack it first"),
    (b"\xfd7zXZ", "compressed with xz; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it first"),
    (b"<!DOCTYPE", "a web page; perhaps a download that asked for a login"),
    (b"<html", "a web page; perhaps a download that asked for a login"),
)
"""First bytes of files that cannot be read here, with any name, and what to say about each."""


@dataclass(frozen=True)
class Form:
    """Encoding and CSV delimiter of local files; None: detected from the file."""

    encoding: str | None = None
    delimiter: str | None = None

    @classmethod
    def of(cls, config: DataConfig) -> "Form":
        """From `data.encoding` and `data.delimiter`."""
        return cls(config.encoding, config.delimiter)


PLAIN = Form()


def unpacked(origin: str, raw: bytes) -> bytes:
    """The content of a file, unpacked if it is compressed with gzip.

    Raises:
        UserError: the file is of a kind that cannot be read as rows.
    """
    if raw.startswith(GZIP):
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{origin}: looks like gzip, but cannot be unpacked ({error})") from None
    if is_pointer(raw):
        raise UserError(f"{origin}: is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository")
    kind = next((kind for start, kind in KINDS if raw[:16].upper().startswith(start.upper())), None)
    if kind is not None:
        raise UserError(f"{origin}: is {kind}")
    return raw


def decode(origin: str, raw: bytes, encoding: str | None = None) -> str:
    """Decode text. A byte-order mark decides first, then `encoding`; None: UTF-8.

    Raises:
        UserError: it is not text in that encoding. No other one is tried: Latin-1 would read anything, often wrongly.
    """
    marked = next((name for mark, name in MARKS if raw.startswith(mark)), None)
    try:
        text = raw.decode(marked or encoding or "utf-8")
    except UnicodeDecodeError as error:
        if marked or encoding:
            raise UserError(
                f"{origin}: is not text in {marked or encoding} ({error.reason}); check data.encoding"
            ) from None
        if raw[:4096].count(0) > len(raw[:4096]) // 4:
            way = 'it may be UTF-16 without a mark: set data.encoding = "utf-16-le", or save it as UTF-8'
        else:
            way = 'save the file with UTF-8 encoding, or set data.encoding, for example "cp1252" (Windows) or "latin-1"'
        raise UserError(f"{origin} line {raw.count(10, 0, error.start) + 1}: not UTF-8; {way}") from None
    if "\x00" in text:  # every other byte of Latin letters in UTF-16, which UTF-8 can read as well
        raise UserError(
            f"{origin} line {text.count(chr(10), 0, text.index(chr(0))) + 1}: has zero bytes, so it is not text in "
            f'{marked or encoding or "UTF-8"}; it may be UTF-16 without a mark: set data.encoding = "utf-16-le", or '
            "save it as UTF-8"
        )
    return text
