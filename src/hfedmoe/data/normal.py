"""Texts that look the same are the same: labels, client ids and answers are compared in a normal form."""

import re
import unicodedata
from collections.abc import Collection
from typing import Any

INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")
"""Soft hyphens, zero-width spaces and joiners, marks of direction and byte order."""
WHOLE = re.compile(r"(-?\d+)\.0+")


def normal(text: str) -> str:
    """Composed accents (NFC), plain spaces, nothing invisible, no spaces at the ends."""
    composed = unicodedata.normalize("NFC", INVISIBLE.sub("", text))
    return re.sub(r"[^\S\r\n\t]", " ", composed).strip()


def key_of(cell: Any) -> str:
    """A cell that names something, as text: 1.0 is 1, as pandas writes it where another row has none."""
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, int) or (isinstance(cell, float) and cell.is_integer()):
        return str(int(cell))
    return normal(str(cell))


def among(label: str, labels: Collection[str]) -> str | None:
    """The one of `labels` that a label means: itself, or the same number written otherwise (1 and 1.0); None: none."""
    if label in labels:
        return label
    return next((known for known in labels if _number(known) == _number(label)), None)


def _number(label: str) -> str:
    """A label without the zeros behind the point of a whole number."""
    match = WHOLE.fullmatch(label)
    return label if match is None else match[1]


def distinct(labels: Collection[str]) -> tuple[str, ...]:
    """Labels without those that are another one written otherwise (1.0 beside 1), sorted."""
    return tuple(sorted(label for label in set(labels) if _number(label) == label or _number(label) not in labels))
