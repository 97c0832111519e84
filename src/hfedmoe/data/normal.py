"""A normal form in which labels, client ids and answers are compared, so that texts that look alike are equal."""

import re
import unicodedata
from collections.abc import Collection
from typing import Any

INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")
"""Soft hyphens, zero-width spaces and joiners, direction marks and byte-order marks."""
WHOLE = re.compile(r"(-?\d+)\.0+")


def normal(text: str) -> str:
    """Composed accents (NFC), plain spaces, nothing invisible, no spaces at the ends."""
    composed = unicodedata.normalize("NFC", INVISIBLE.sub("", text))
    return re.sub(r"[^\S\r\n\t]", " ", composed).strip()


def key_of(cell: Any) -> str:
    """A cell that names something, as text. 1.0 becomes 1: pandas writes 1.0 if another row is empty."""
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, int) or (isinstance(cell, float) and cell.is_integer()):
        return str(int(cell))
    return normal(str(cell))


def among(label: str, labels: Collection[str]) -> str | None:
    """The entry of `labels` that equals a label, also as a number in another form (1 and 1.0); None: there is none."""
    if label in labels:
        return label
    return next((known for known in labels if _number(known) == _number(label)), None)


def _number(label: str) -> str:
    """A label; of a whole number, without the zeros after the point."""
    match = WHOLE.fullmatch(label)
    return label if match is None else match[1]


def distinct(labels: Collection[str]) -> tuple[str, ...]:
    """Sorted labels without duplicates; 1.0 is left out if there is also 1."""
    return tuple(sorted(label for label in set(labels) if _number(label) == label or _number(label) not in labels))
