"""`hfedmoe chat`: labels with the probabilities of `predict`, and answers that end where training taught them to."""

import io
import json

import pytest

from hfedmoe.models.tiny import tiny_model, tiny_tokenizer
from tests.commands import hfedmoe

WORDS = {"grain": "wheat corn harvest tonnes", "crude": "oil barrels opec prices"}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' : ' + message['content'] }}"
    "{{ ' cts ' if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)
"""A chat template with words that the tokenizer of tiny knows; an answer ends with `cts`."""
TAUGHT = ["federation.rounds=2", "train.steps=16", "train.lr=1e-2", "clients.count=2", "clients.budgets=['100%']"]


def run(root, name, rows, *settings):
    file = root / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    every = [f"data.source={file}", "name=chat", "partition.min_rows=4", "threads=1", *settings]
    out = root / name
    assert hfedmoe("run", "tiny", "--out", out, *(part for text in every for part in ("--set", text))) == 0
    return out


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    rows = [
        {"text": " ".join(words.split()[n % 4 :] + words.split()[: n % 4]), "label": label}
        for n in range(20)
        for label, words in WORDS.items()
    ]
    settings = ["federation.rounds=1", "train.steps=8", "clients.count=2", "train.loss=choices", "partition.alpha=10"]
    return run(tmp_path_factory.mktemp("chat"), "labels", rows, *settings)


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """A run of a model with a chat template that always answers with two words."""
    root = tmp_path_factory.mktemp("chat")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_tokens(["user", "assistant"])
    tiny_model(len(tokenizer), seed=0).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    turns = [("user", "net profit"), ("assistant", "oil prices"), ("user", "corn"), ("assistant", "oil prices")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}] * 30
    settings = [f"model.name={root / 'model'}", "data.format=instructions", "partition.scheme=iid", *TAUGHT]
    return run(root, "talk", rows, *settings)


def test_labels_are_those_of_predict(labelled, tmp_path, capsys, monkeypatch):
    texts = ["oil opec barrels", "corn tonnes harvest"]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert hfedmoe("predict", labelled, tmp_path / "new.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "new.predicted.jsonl").read_text().splitlines()]
    assert hfedmoe("export", labelled, tmp_path / "out") == 0
    for target in (labelled, tmp_path / "out"):
        capsys.readouterr()
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{texts[0]}\n\n{texts[1]}\n"))
        assert hfedmoe("chat", target) == 0
        lines = capsys.readouterr().out.splitlines()
        for line, row in zip(lines, rows, strict=True):
            shares = {label: f"{100 * row[f'p_{label}']:.1f} %" for label in WORDS}
            best = row["predicted"]
            assert line.startswith(f"{best} {shares[best]}")
            assert all(f"{label} {share}" in line for label, share in shares.items())
    assert rows[0]["p_crude"] > rows[1]["p_crude"]  # two texts, two answers
    assert hfedmoe("chat", labelled, "--text", texts[1], "--checkpoint", "last") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_conversation_goes_on_and_answers_end(talking, capsys, monkeypatch):
    assert hfedmoe("chat", talking, "--text", "net profit") == 0
    assert capsys.readouterr().out == "oil prices\n"  # and not 128 words: its turn has ended
    monkeypatch.setattr("sys.stdin", io.StringIO("net profit\ncorn\n\nnet profit\n"))
    assert hfedmoe("chat", talking) == 0
    assert capsys.readouterr().out == "oil prices\n" * 3
    assert hfedmoe("chat", talking, "--text", "net profit", "--tokens", 1) == 0
    assert capsys.readouterr().out == "oil\n"


def test_what_the_model_is_asked_is_what_it_was_trained_on(talking, capsys):
    from hfedmoe.predict.answering import open_answerer

    asked = open_answerer(talking)
    seen = []
    asked.loaded.model.generate = lambda **given: seen.append(asked.loaded.tokenizer.decode(given["input_ids"][0]))
    asked.answer([("user", "net profit"), ("assistant", "oil prices"), ("user", "crude")], 4, lambda piece: None)
    assert seen == ["user : net profit assistant : oil prices cts user : crude assistant :"]


def test_wrong_requests_are_one_line(labelled, tmp_path, capsys):
    cases = [
        ([tmp_path / "gone"], "neither a run folder (no config.toml) nor an export"),
        ([labelled, "--checkpoint", "7"], "no checkpoint of round 7"),
        ([labelled, "--text", " "], "--text: is empty"),
        ([labelled, "--set", "train.lr=1"], "these can change: model.device"),
    ]
    capsys.readouterr()
    for arguments, message in cases:
        assert hfedmoe("chat", *arguments) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
