"""Every example is looked at once before a run: what stops it, and what is counted."""

import json

import pytest
from transformers import AutoTokenizer

from hfedmoe.config import DataConfig, PartitionConfig, config_from_tree
from hfedmoe.data.encoding import Encoder
from hfedmoe.data.example import Example
from hfedmoe.data.fits import Room, check_task
from hfedmoe.data.task import Task
from hfedmoe.data.tasks import load_watched_task
from hfedmoe.errors import UserError
from hfedmoe.events import Silent
from hfedmoe.export.snippet import prompt_words
from hfedmoe.models.packaged import smollm2_folder
from hfedmoe.runs.settings import read_run_config
from hfedmoe.simulation import run

ROOM = Room(512, 512)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(smollm2_folder())


def checked(tokenizer, kind, train, test=(), max_tokens=8, room=ROOM, template="{text}"):
    task = Task("t", kind, template, (), list(train), list(test))
    return check_task(task, [], Encoder.for_task(tokenizer, task, max_tokens), room)


def said(text, words):
    return Example("x", completion="w " * words, messages=(("user", text), ("assistant", "w " * words)))


def test_answers_that_are_cut_are_counted_and_so_are_most_prompts(tokenizer):
    fits, long_answer = Example("x", completion="a b"), Example("x", completion="a b c d e f g h")
    assert checked(tokenizer, "completion", [fits], [fits]) == []
    few = "data.max_tokens=8 cuts the end of 2 of 5 answers; raise it, or leave these rows out"
    assert checked(tokenizer, "completion", [fits, fits, long_answer], [fits, long_answer]) == [few]
    long_prompt = Example("a b c d e f g h i", completion="a")
    most = "data.max_tokens=8 cuts about 67% of the training examples; raise it"
    assert checked(tokenizer, "completion", [fits, long_prompt, long_prompt]) == [most]
    # A prompt that just fits is not cut; texts with a label always may be.
    assert checked(tokenizer, "completion", [Example("a b c d e f g h", completion="a")]) == []
    assert checked(tokenizer, "classification", [Example("a b c d e f g h i", ("a", "b"), 0)]) == []
    talks = [said("x", 1), said("x", 900)]
    assert checked(tokenizer, "completion", talks, max_tokens=200) == [
        "data.max_tokens=200 cuts the end of 1 of 2 answers; raise it, or leave these rows out"
    ]


def test_a_choice_is_not_cut(tokenizer):
    rows = [Example("x", ("a", "b"), 0), Example("x", ("a", "w " * 9), 0, origin="rows.jsonl line 7")]
    with pytest.raises(UserError, match=r"^rows\.jsonl line 7: an answer has \d+ tokens, but may have 8; shorten it"):
        checked(tokenizer, "choices", rows)
    # Whole choices are measured, whatever data.max_tokens says, but they must fit into the model.
    assert checked(tokenizer, "choices", rows[:1], rows) == []
    with pytest.raises(UserError, match=r"^rows\.jsonl line 7: a choice has \d+ tokens, but the model takes 4; "):
        checked(tokenizer, "choices", rows[:1], rows, room=Room(64, 4))


@pytest.mark.parametrize(
    ("kind", "example"),
    [
        ("completion", Example("a b c d e f g h", completion="a b c d e f g h", origin="here line 3")),
        ("classification", Example("a b c d e f g h", ("a b c d", "b"), 0, origin="here line 3")),
        ("completion", said("x " * 9, 9)),
    ],
)
def test_examples_must_fit_into_the_model(tokenizer, kind, example):
    used = 11 if kind == "classification" else 15
    checked(tokenizer, kind, [example], room=Room(used, used))
    message = f"take {used} tokens with data.max_tokens=8, but the model has {used - 1} positions; set data.max_tokens"
    with pytest.raises(UserError, match=message + f" to at most {used // 2}$"):
        checked(tokenizer, kind, [example], room=Room(used - 1, used - 1))
    # Short rows fit even where longer ones would not, and models that say nothing take all.
    assert checked(tokenizer, "classification", [Example("a", ("a", "b"), 0)], room=Room(2, 2)) == []
    checked(tokenizer, kind, [example], room=Room(None, 2048))


@pytest.mark.parametrize("held_out", [False, True])
def test_a_conversation_that_the_template_refuses_is_named(held_out):
    strict = AutoTokenizer.from_pretrained(smollm2_folder())
    strict.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    strict.chat_template = strict.chat_template.replace("{{ m['content'] }}", "{{ '>' + m['content'] }}")
    bad = Example("x", completion="y", messages=(("system", "x"), ("assistant", "y")), origin="talks.jsonl line 9")
    good = [said("x", 1)] * 300
    rows = (good, [bad]) if held_out else ([*good, bad], [])
    with pytest.raises(UserError, match=r"^talks\.jsonl line 9: .* refuses a conversation \(no system role\); set"):
        checked(strict, "completion", *rows, max_tokens=200)


def test_rows_know_their_lines(tmp_path):
    for name, row in {
        "labels": {"text": "t", "label": "a"},
        "choices": {"prompt": "t", "choices": ["a", "b"], "answer": 0},
        "completions": {"prompt": "t", "completion": "b"},
    }.items():
        path = tmp_path / f"{name}.jsonl"
        rows = [row | ({"label": "ab"[i % 2]} if name == "labels" else {}) for i in range(4)]
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        task, watch = load_watched_task(DataConfig(source=str(path)), PartitionConfig(scheme="iid"), 0, 0)
        assert {e.origin for e in [*task.train, *task.test, *watch]} == {f"{path} line {i}" for i in range(1, 5)}


def test_a_run_notes_the_kind_that_its_columns_told(tmp_path):
    source = tmp_path / "rows.jsonl"
    row = json.dumps({"prompt": "oil", "choices": ["oil rose", "trade fell"], "answer": 0})
    source.write_text("\n".join([row] * 4), encoding="utf-8")
    tree = {
        "model": {"name": "tiny"},
        "data": {"source": str(source)},
        "partition": {"scheme": "iid", "min_rows": 1},
        "clients": {"count": 1},
        "train": {"steps": 1, "rank": 2},
        "federation": {"rounds": 1},
    }
    config = read_run_config(run(config_from_tree(tree, "test"), tmp_path / "run", Silent()) / "config.toml")
    assert config.data.format == "choices"
    assert prompt_words(config.data).startswith("`'Question: {text}\\nAnswer:'`")


def test_a_bad_row_stops_the_run_and_leaves_no_folder(tmp_path):
    source = tmp_path / "talks.jsonl"
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    source.write_text("\n".join([json.dumps({"messages": turns})] * 4), encoding="utf-8")
    tree = {
        "model": {"name": "tiny"},  # its tokenizer has no chat template
        "data": {"source": str(source), "format": "instructions"},
        "partition": {"scheme": "iid", "min_rows": 1},
        "clients": {"count": 1},
        "train": {"steps": 1, "rank": 2},
        "federation": {"rounds": 1},
    }
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"talks\.jsonl line \d: the tokenizer has no chat template"):
        run(config_from_tree(tree, "test"), out, Silent())
    assert not out.exists()
    tree["data"]["chat"] = "plain"
    run(config_from_tree(tree, "test"), out, Silent())
