"""Words for labels that the tokenizer begins differently, so that one token decides between labels."""

import re
import string
from collections.abc import Iterator, Sequence
from typing import Any

from hfedmoe.data.encoding import Encoder
from hfedmoe.data.example import Example
from hfedmoe.errors import UserError

MOST_TOKENS = 64
"""Of a label word that is tried."""


def words_for(labels: Sequence[str], tokenizer: Any, template: str) -> dict[str, str] | None:
    """A word for each label that needs another than itself; empty: none does; None: no such words were found.

    Tried for each label, in this order: the label as words, each of its own words, a letter, a word of the tokenizer.
    """
    first = _FirstTokens(tokenizer, template)
    if first.tells_apart(labels):
        return {}
    chosen: dict[str, str] = {}
    taken: dict[int, str] = {}
    shared = _shared_tokens(labels, first)
    # Labels that keep their own word come first, so that no other takes it.
    for label in sorted(labels, key=lambda label: first.of(label) is None or first.of(label) in shared):
        for word in _candidates(label, labels, tokenizer):
            token = first.of(word)
            if token is not None and token not in taken and word not in chosen.values():
                chosen[label], taken[token] = word, label
                break
        else:
            return None
    if not first.tells_apart([chosen[label] for label in labels]):
        return None
    return {label: chosen[label] for label in labels if chosen[label] != label}


def _shared_tokens(labels: Sequence[str], first: "_FirstTokens") -> set[int]:
    """First tokens that several labels have."""
    tokens = [token for token in map(first.of, labels) if token is not None]
    return {token for token in tokens if tokens.count(token) > 1}


def _candidates(label: str, labels: Sequence[str], tokenizer: Any) -> Iterator[str]:
    if not re.search(r"[A-Za-z]{2}", label):  # a number or a code says nothing; letters are easier to replace
        yield from (word for word in string.ascii_uppercase if word not in labels)
    yield label
    own = [word for word in re.split(r"[^\w]+|_|(?<=[a-z])(?=[A-Z])", label) if word]
    yield " ".join(own)
    for word in own:
        yield from (word, word.lower(), word.capitalize())
    yield from (word for word in string.ascii_uppercase + string.ascii_lowercase if word not in labels)
    yield from (word for word in sorted(tokenizer.get_vocab(), key=len) if word.isalpha() and word not in labels)


class _FirstTokens:
    """The first token of a word behind the prompt."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self._encoder = Encoder(tokenizer, template, max_tokens=1 << 20)
        self._unknown = tokenizer.unk_token_id
        self._known: dict[str, list[int]] = {}

    def of(self, word: str) -> int | None:
        """None: the tokenizer does not know the word, or it becomes too many tokens."""
        tokens = self._tokens(word)
        useless = not tokens or len(tokens) > MOST_TOKENS or tokens[0] == self._unknown
        return None if useless or not self._encoder.tokenizer.decode(tokens[:1]).strip() else tokens[0]

    def tells_apart(self, words: Sequence[str]) -> bool:
        """Whether all words begin with a token of their own, which the tokenizer knows."""
        found = [self.of(word) for word in words]
        return None not in found and len(set(found)) == len(found)

    def _tokens(self, word: str) -> list[int]:
        if word not in self._known:
            try:
                self._known[word] = self._encoder.choices(Example("", (word,), 0))[0]
            except UserError:  # it becomes no tokens, or far too many
                self._known[word] = []
        return self._known[word]
