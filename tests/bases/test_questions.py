"""Multiple-choice rows made from texts."""

import json
import random
from pathlib import Path

import pytest

from hfedmoe.bases import questions as made
from hfedmoe.bases.questions import BEGIN, PASSAGE, questions, write_questions
from hfedmoe.bases.texts import Piece
from hfedmoe.config import DataConfig, PartitionConfig
from hfedmoe.data.tasks import load_task

DOMAINS = ("sport", "money", "space", "dialogue")


def piece(domain: str, number: int, words: int = BEGIN + PASSAGE) -> Piece:
    return Piece(" ".join(f"{domain}{number}w{i}" for i in range(words)), domain, domain)


FOUND = [piece(domain, n) for domain in DOMAINS for n in range(6)] + [piece("sport", 9, words=20)]


def test_the_right_passage_goes_on_and_one_wrong_one_is_of_the_same_domain() -> None:
    rows = questions(FOUND, 4, random.Random(0))
    assert len(rows) == 12  # four of each domain, none of dialogue, none of a short text
    for row in rows:
        text, choices, answer = str(row["text"]), list(row["choices"]), int(row["answer"])  # type: ignore[call-overload]
        begun = text.split()[0].removesuffix("w0")
        assert text.split() == [f"{begun}w{i}" for i in range(BEGIN)]
        assert choices[answer].split() == [f"{begun}w{i}" for i in range(BEGIN, BEGIN + PASSAGE)]
        assert len(set(choices)) == len(choices) == 4
        assert sum(choice.startswith(str(row["domain"])) for choice in choices) == 2
    assert len({row["answer"] for row in rows}) > 1
    assert rows == questions(FOUND, 4, random.Random(0)) != questions(FOUND, 4, random.Random(1))


def test_rows_are_a_task_split_by_domain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made, "pieces", lambda split, words: FOUND)
    line = write_questions(tmp_path / "q", seed=0)
    assert line.endswith("18 questions to train on, 18 held out")
    train, test = str(tmp_path / "q" / "train.jsonl"), str(tmp_path / "q" / "test.jsonl")
    split = PartitionConfig(scheme="natural", column="domain")
    task = load_task(DataConfig(source=train, test=test), split, seed=0)
    assert (task.kind, task.part_names, len(task.test)) == ("choices", ["money", "space", "sport"], 18)
    first = json.loads(Path(train).read_text(encoding="utf-8").splitlines()[0])
    assert any(example.choices == tuple(first["choices"]) for example in task.train)
