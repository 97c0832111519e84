"""Known data sets: for each name, where it is, what its rows look like, and the prompt.

`DataFormat` in `config/data.py` lists the same names. `tests/data/fixtures/` has rows of each.
"""

from hfedmoe.config import DataConfig
from hfedmoe.data.known.choices import ARC_CHALLENGE, ARC_EASY, HELLASWAG, MMLU, PIQA
from hfedmoe.data.known.conversations import INSTRUCTIONS
from hfedmoe.data.known.known_set import KnownSet, Row
from hfedmoe.data.known.labelled import AG_NEWS, NEWSGROUPS, NEWSGROUPS_WORDS, REUTERS_R8, REUTERS_R52

__all__ = ["KNOWN", "KnownSet", "Row", "known_set"]

KNOWN: dict[str, KnownSet] = {
    entry.name: entry
    for entry in (
        AG_NEWS,
        NEWSGROUPS,
        NEWSGROUPS_WORDS,
        REUTERS_R8,
        REUTERS_R52,
        PIQA,
        HELLASWAG,
        MMLU,
        ARC_EASY,
        ARC_CHALLENGE,
        INSTRUCTIONS,
    )
}


def known_set(config: DataConfig) -> KnownSet | None:
    """The known data set that the configuration reads, by `data.format`, else by `data.source`; None: none."""
    if config.format != "auto":
        return KNOWN.get(config.format)
    return None if config.clients is not None else KNOWN.get(config.source)
