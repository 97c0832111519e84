"""Decode the bytes of a file as text; anything that is not text is refused in one line that says what it is."""

import codecs
import gzip
import json
import zlib
from dataclasses import dataclass

from hfedmoe.config import DataConfig
from hfedmoe.errors import UserError
from hfedmoe.files.lfs import IS_POINTER, is_pointer

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
WIDE = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
"""Encodings that have NUL bytes in every line, to be named if a file has them and no byte-order mark."""


RUN, OPTION, DEVICE = "data.", "--", "this device's "


@dataclass(frozen=True)
class Form:
    """Encoding and CSV delimiter of local files; None: detected from the file."""

    encoding: str | None = None
    delimiter: str | None = None
    place: str = RUN
    """Where they are set, for error messages: `RUN`, `OPTION` or `DEVICE`."""

    @classmethod
    def of(cls, config: DataConfig, place: str = RUN) -> "Form":
        """From `data.encoding` and `data.delimiter`, or what a device says in their place."""
        return cls(config.encoding, config.delimiter, place)

    def setting(self, name: str, value: str | None = None) -> str:
        """How an error message calls "encoding" or "delimiter", and a value for it."""
        if value is None:
            return f"{self.place}{name}"
        return f"{self.place}{name}{' ' if self.place == OPTION else ' = '}{json.dumps(value)}"


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
        if raw.startswith(GZIP):
            raise UserError(f"{origin}: is compressed twice; unpack it first")
    if is_pointer(raw):
        raise UserError(f"{origin}: {IS_POINTER}")
    kind = next((kind for start, kind in KINDS if raw[:16].upper().startswith(start.upper())), None)
    if kind is not None:
        raise UserError(f"{origin}: is {kind}")
    return raw


def decode(origin: str, raw: bytes, form: Form = PLAIN) -> str:
    """Decode text. A byte-order mark decides first, then `form.encoding`; None: UTF-8.

    Raises:
        UserError: it is not text in that encoding, or holds NULs, which no text does. No other encoding is tried:
            Latin-1 would read anything, often wrongly.
    """
    encoding, setting = form.encoding, form.setting("encoding")
    marked = next((name for mark, name in MARKS if raw.startswith(mark)), None)
    try:
        text = raw.decode(marked or encoding or "utf-8")
    except UnicodeError as error:  # not always a UnicodeDecodeError: punycode
        if marked or encoding:
            reason = getattr(error, "reason", error)
            raise UserError(f"{origin}: is not text in {marked or encoding} ({reason}); check {setting}") from None
        _refuse_wide(origin, raw, form)
        line = raw.count(10, 0, getattr(error, "start", 0)) + 1
        raise UserError(
            f"{origin} line {line}: not UTF-8; save the file with UTF-8 encoding, or set {setting}, for example "
            '"cp1252" (Windows) or "latin-1"'
        ) from None
    if "\x00" in text:
        _refuse_wide(origin, raw, form)
        raise UserError(
            f"{origin} line {text.count(chr(10), 0, text.index(chr(0))) + 1}: holds a NUL character; if the file is in "
            f'another encoding, such as UTF-16, set {setting} (for example "utf-16-le"), else remove the character'
        )
    return text


def looks_like(text: str) -> str | None:
    """What kind of table a text looks like, and the suffix to name it with; None: none of them."""
    begun = text.lstrip()
    first = begun.split("\n", 1)[0]
    try:
        if begun[:1] == "{" and isinstance(json.loads(first), dict):
            return "looks like JSON lines; name it .jsonl"
        if begun[:1] == "[" and isinstance(json.loads(begun), list):
            return "looks like JSON; name it .json"
    except (ValueError, RecursionError):
        return None
    if begun[:1] not in ("{", "[") and any(delimiter in first for delimiter in ",;\t|"):
        return "looks like CSV; name it .csv"
    return None


def _refuse_wide(origin: str, raw: bytes, form: Form) -> None:
    """Raise UserError if a file is text in one of `WIDE`."""
    wide = next((name for name in WIDE if 0 in raw and _is_text(raw, name)), None)
    if wide is not None:
        setting = form.setting("encoding", wide)
        raise UserError(
            f"{origin}: looks like {wide[:6].upper()} without a mark: set {setting}, or save it as UTF-8"
        ) from None


def _is_text(raw: bytes, encoding: str) -> bool:
    """Whether bytes are lines of text in an encoding: in a wrong one they have errors, NULs or no ends of lines."""
    try:
        text = raw.decode(encoding)
    except UnicodeError:
        return False
    return "\x00" not in text and ("\n" in text or "\r" in text)
