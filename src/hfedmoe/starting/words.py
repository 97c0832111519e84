"""Words for labels that the tokenizer begins differently, so that one token decides between labels."""

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from hfedmoe.data.encoding import Encoder
from hfedmoe.data.example import Example
from hfedmoe.errors import UserError

MOST_TOKENS = 64
"""Of a label word that is tried."""


def words_for(labels: Sequence[str], tokenizer: Any, template: str) -> dict[str, str] | None:
    """A word for each label that needs another than itself; empty: none does; None: no such words were found.

    A label that begins with a token of its own keeps its word. Tried for each other, in this order: its words that no
    other label has, a letter, the label itself, each of its words, a word of the tokenizer.
    """
    first = _FirstTokens(tokenizer, template)
    if first.tells_apart(labels):
        return {}
    counts = Counter(map(first.of, labels))
    chosen = {label: label for label in labels if (token := first.of(label)) is not None and counts[token] == 1}
    taken = {first.of(label) for label in chosen}
    for label in labels:
        if label in chosen:
            continue
        for word in _candidates(label, labels, first, tokenizer):
            token = first.of(word)
            if token is not None and token not in taken:
                chosen[label] = word
                taken.add(token)
                break
        else:
            return None
    return {label: chosen[label] for label in labels if chosen[label] != label}


def _candidates(label: str, labels: Sequence[str], first: "_FirstTokens", tokenizer: Any) -> Iterator[str]:
    own = _words(label)
    others = {word.lower() for other in labels if other != label for word in _words(other)}
    yield from (word for word in own if word.lower() not in others and re.search(r"[^\W\d_]{2}", word))
    for word in own:
        if first.of(word) is None:  # the tokenizer may know it in other letters
            yield from (word.lower(), word.capitalize())
    yield from (word for word in string.ascii_uppercase + string.ascii_lowercase if word not in labels)
    yield label
    yield from own
    yield from (word for word in sorted(tokenizer.get_vocab(), key=len) if word.isalpha() and word not in labels)


def _words(label: str) -> list[str]:
    """The words of a label: `crudeOil`, `crude-oil` and `crude_oil` have two."""
    return [word for word in re.split(r"[^\w]+|_|(?<=[a-z])(?=[A-Z])", label) if word]


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
