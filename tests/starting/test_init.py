"""`hfedmoe init`: the config that it writes runs, says nothing of the rows, and what cannot work is one line."""

import csv
import json
import random
import tomllib
from pathlib import Path

import pytest

from hfedmoe.cli import main
from hfedmoe.config import load_config

TOPICS = {
    "grain": "wheat corn harvest tonnes farmers crop",
    "crude": "oil barrels opec prices crude output",
    "earn": "net profit quarter dividend shares cts",
}
MARK = "secretword"
"""In every text: it must not get into a config."""


def hfedmoe(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def texts(number: int) -> list[tuple[str, str]]:
    """Texts with their topics."""
    draw = random.Random(0)
    chosen = [draw.choice(list(TOPICS)) for _ in range(number)]
    return [(" ".join([MARK, *draw.choices(TOPICS[topic].split(), k=draw.randint(4, 14))]), topic) for topic in chosen]


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def started(*arguments: object) -> dict:
    """The config that `init` writes for the model tiny, as a tree; it is valid and says nothing of the texts."""
    assert hfedmoe("init", *arguments, "--model", "tiny") == 0
    text = Path("my.toml").read_text()
    assert MARK not in text
    load_config(Path("my.toml"))
    return tomllib.loads(text)


def runs(*more: str) -> None:
    """The config runs, for one round with one step."""
    settings = ["federation.rounds=1", "train.steps=1", "data.test_rows=20", *more]
    assert hfedmoe("run", "my.toml", "--out", "run", *(part for text in settings for part in ("--set", text))) == 0


def test_a_csv_with_labels(here, capsys):
    with (here / "reviews.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "Body", "topic", "score"])
        table.writerows([n, text, topic, n / 7] for n, (text, topic) in enumerate(texts(240)))
    tree = started("reviews.csv")
    told = capsys.readouterr().out.splitlines()
    assert tree["name"] == "reviews"
    data = tree["data"]
    assert (data["source"], data["text"], data["label"]) == ("reviews.csv", "Body", "topic")
    assert data["template"] == "Body: {text}\nTopic:"
    assert "label_words" not in data  # the tokenizer knows these labels
    assert 16 <= data["max_tokens"] <= 32
    assert tree["train"]["loss"] == "choices"
    assert tree["clients"] == {"count": 2, "budgets": ["100%"]}
    assert any(line.startswith("labels: ") and "grain (" in line for line in told)
    assert told[-1] == "wrote my.toml; next: hfedmoe run my.toml"
    assert hfedmoe("init", "reviews.csv", "--model", "tiny") == 2
    assert capsys.readouterr().err == "error: my.toml: exists already; --force replaces it, --out writes another\n"
    runs()
    other = started("reviews.csv", "--force", "--set", "clients.count=3", "--set", "train.lr=1e-2")
    assert (other["clients"]["count"], other["train"]["lr"]) == (3, 0.01)


def test_files_of_several_clients_whose_labels_are_numbers(here, capsys):
    numbers = {topic: number for number, topic in enumerate(TOPICS)}
    for name, rows in (("north", texts(60)), ("south", texts(40))):
        lines(here / f"{name}.jsonl", [{"message": text, "rating": numbers[topic]} for text, topic in rows])
    tree = started("north.jsonl", "south.jsonl")
    assert tree["data"]["clients"] == ["north.jsonl", "south.jsonl"]
    assert tree["clients"]["count"] == 2
    words = tree["data"]["label_words"]
    assert words.keys() == {"0", "1", "2"}
    assert len(set(words.values())) == 3
    assert "words:  0 = " in capsys.readouterr().out
    assert "partition" not in tree
    runs()


def test_a_column_that_names_the_client(here):
    rows = [{"hospital": f"h{n % 3}", "text": text, "label": topic} for n, (text, topic) in enumerate(texts(120))]
    tree = started(lines(here / "notes.jsonl", rows))
    assert tree["partition"] == {"scheme": "natural", "column": "hospital"}
    assert tree["clients"]["count"] == 3


def test_texts_without_labels(here):
    rows = [{"question": text, "answer": text[::-1]} for text, _ in texts(80)]
    tree = started(lines(here / "asked.jsonl", rows))
    assert (tree["data"]["text"], tree["data"]["completion"]) == ("question", "answer")
    assert tree["data"]["template"] == "Question: {text}\nAnswer:"
    assert tree["partition"]["scheme"] == "iid"


def test_conversations(here):
    turns = [("user", f"{MARK} net profit"), ("assistant", "oil prices")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]} for _ in range(60)]
    tree = started(lines(here / "chats.jsonl", rows))
    assert tree["data"]["format"] == "instructions"
    assert tree["data"]["chat"] == "plain"  # the tokenizer of tiny has no chat template
    assert tree["partition"]["min_rows"] <= 12


def test_multiple_choice(here):
    draw = random.Random(0)
    rows = [
        {"question": text, "choices": ["oil prices", "net profit", "grain"], "answer": draw.randrange(3)}
        for text, _ in texts(60)
    ]
    tree = started(lines(here / "quiz.jsonl", rows))
    assert tree["data"]["text"] == "question"
    assert tree["partition"]["scheme"] == "iid"
    assert load_config(Path("my.toml")).data.choices == "choices"


def test_what_cannot_work_is_one_line(here, capsys):
    labelled = [{"text": text, "label": topic} for text, topic in texts(40)]
    good = lines(here / "good.jsonl", labelled)
    (here / "notes.toml").write_text("mine")
    (here / "sheet.csv").write_bytes(b"PK\x03\x04 and so on")
    (here / "words.txt").write_text("some words\n")
    lines(here / "numbers.jsonl", [{"a": n, "b": n / 3} for n in range(40)])
    lines(here / "one.jsonl", [row | {"label": "grain"} for row in labelled])
    lines(here / "bare.jsonl", [{"body": row["text"]} for row in labelled])
    lines(here / "two.jsonl", [{"body": text, "a": t, "b": t[:1]} for text, t in texts(60)])
    lines(here / "other.jsonl", [{"body": text, "kind": t} for text, t in texts(60)])
    lines(here / "hole.jsonl", [*labelled, {"text": "", "label": "grain"}])
    tiny = ["--model", "tiny"]
    cases = [
        (["gone.csv", *tiny], "gone.csv: no such file"),
        (["piqa", *tiny], 'a data set by name needs only data.source = "piqa"'),
        ([here, *tiny], "is a folder; name the files in it"),
        ([good, good, *tiny], "is named twice"),
        (["sheet.csv", *tiny], "is a spreadsheet"),
        (["words.txt", *tiny], 'unknown format ".txt"'),
        (["numbers.jsonl", *tiny], "no column has texts; its columns: a, b"),
        (["one.jsonl", *tiny], 'the same value in the column "label"'),
        (["bare.jsonl", *tiny], "no column has labels, answers or conversations to learn; its columns: body"),
        (["two.jsonl", *tiny], "several columns could be the label (a, b); name one: --set data.label=a"),
        ([good, "other.jsonl", *tiny], "has other columns (body, kind)"),
        (["hole.jsonl", *tiny], 'hole.jsonl line 41: column "text" is empty'),
        ([good, *tiny, "--set", "data.label=topic"], '--set data.label=topic: no column "topic"'),
        ([good, *tiny, "--set", "data.source=x.csv"], "name the file as an argument"),
        ([good, *tiny, "--set", "train.learning_rate=1"], "unknown key"),
        ([good, *tiny, "--out", "no/my.toml"], "there is no folder no"),
        ([good, *tiny, "--out", "notes.toml"], "exists already"),
        ([good, "--model", "./none"], "no such folder"),
        ([good, "--model", "smollm2"], "(here --set model.upcycle.experts=8, or --model)"),
    ]
    capsys.readouterr()
    for arguments, expected in cases:
        assert hfedmoe("init", *arguments) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert expected in line, line
        assert MARK not in line
    assert not (here / "my.toml").exists()
    assert (here / "notes.toml").read_text() == "mine"
