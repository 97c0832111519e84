"""A normal form in which labels, client ids and answers are compared, so that texts that look alike are equal."""

import re
import unicodedata
from collections.abc import Collection
from typing import Any

INVISIBLE = re.compile(
    # England's and Scotland's flags differ only in tags, which are invisible everywhere else: whole flags are kept.
    "(\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f)"
    # Unicode's property Default_Ignorable_Code_Point, with the marks of annotations (U+FFF9 to U+FFFB)
    "|[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
"""Soft hyphens, zero-width spaces and joiners, direction marks, byte-order marks, variation selectors and so on."""
WHOLE = re.compile(r"(-?\d+)\.0+")


def normal(text: str) -> str:
    """Composed accents (NFC), single plain spaces, nothing invisible, no spaces at the ends."""
    composed = unicodedata.normalize("NFC", INVISIBLE.sub(r"\1", text))
    return re.sub(r"[^\S\r\n\t]+", " ", composed).strip()


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
    """Sorted labels without duplicates; of a number in several forms (1, 1.0 and 1.00) the shortest stays."""
    return tuple(sorted(set(shortest(labels).values())))


def shortest(labels: Collection[str]) -> dict[str, str]:
    """Every label, and the shortest one that is the same: 1.00 -> 1, if there is 1."""
    kept: dict[str, str] = {}
    for label in sorted(set(labels), key=len):
        kept.setdefault(_number(label), label)
    return {label: kept[_number(label)] for label in labels}
