"""A normal form in which labels, client ids and answers are compared, so that texts that look alike are equal."""

import re
import unicodedata
from collections.abc import Collection
from typing import Any

_OTHERS = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")
"""Invisible letters of other categories than Cf: joiners, fillers and variation selectors."""
WHOLE = re.compile(r"(-?\d+)\.0+")


def normal(text: str) -> str:
    """Composed accents (NFC), single plain spaces, nothing invisible (such as category Cf), no spaces at the ends."""
    if not text.isascii():
        seen = "".join(letter for letter in text if unicodedata.category(letter) != "Cf")
        text = unicodedata.normalize("NFC", _OTHERS.sub("", seen))
    return re.sub(r"[^\S\r\n\t]+", " ", text).strip()


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
    """Labels without those that are another one written otherwise (1.0 beside 1 or 1.00), sorted."""
    by_number: dict[str, str] = {}
    for label in sorted(set(labels), key=lambda label: (len(label), label)):
        by_number.setdefault(_number(label), label)
    return tuple(sorted(by_number.values()))
