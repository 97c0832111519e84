"""Tasks: kinds, labels, held-out rows, and who holds what."""

import json
from collections import Counter

import pytest

from hfedmoe.config import DataConfig, PartitionConfig, load_config
from hfedmoe.data.example import Example
from hfedmoe.data.partition import partition
from hfedmoe.data.tasks import load_rows, load_task, load_watched_task
from hfedmoe.errors import UserError

ANY = PartitionConfig()


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def labelled(count, labels=("a", "b"), start=0):
    return [{"text": f"text {i}", "label": labels[i % len(labels)]} for i in range(start, start + count)]


def test_the_default_task_is_reuters_with_its_own_test_split():
    task = load_task(DataConfig(test_rows=None), ANY, seed=0)
    assert (task.name, task.kind, len(task.train), len(task.test)) == ("reuters-r8", "classification", 5485, 2189)
    assert task.labels == ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
    assert all(example.choices is task.train[0].choices for example in task.train + task.test)
    assert task.parts is None
    cut = load_task(DataConfig(train_rows=100, test_rows=7), ANY, seed=0)
    assert cut.train == task.train[:100]
    assert cut.test == task.test[:7]


def test_labels_become_words(tmp_path):
    source = write(tmp_path / "r.jsonl", [{"text": " x ", "label": 1}, {"text": "y", "label": 0}])
    config = DataConfig(source=source, test=source, label_words={"1": "good"})
    task = load_task(config, ANY, seed=0)
    assert task.labels == ("0", "1")
    assert sorted(task.train, key=lambda e: e.text) == [
        Example("x", ("0", "good"), 1),
        Example("y", ("0", "good"), 0),
    ]


@pytest.mark.parametrize(
    ("choices", "answer", "index"),
    [
        (["x", "y"], 1, 1),
        (["x", "y"], "y", 1),
        (["x", "y"], " y ", 1),
        (["x", "y"], "1", 1),
        (["x", "y"], "B", 1),
        (["x", "y"], "b", 1),
        (["2", "1", "0"], "1", 1),  # text of a choice before its index
        (["B", "A", "C"], "C", 2),
        (["x", "y"], 1.0, 1),
        (["x", "y"], "1.0", 1),
        ('["x", "y"]', "1", 1),
        (["x", "x"], 1, 1),
    ],
)
def test_answers_are_indices_texts_or_letters(tmp_path, choices, answer, index):
    rows = [{"prompt": "q", "choices": choices, "answer": answer}] * 2
    task = load_task(DataConfig(source=write(tmp_path / "r.jsonl", rows)), ANY, seed=0)
    assert task.kind == "choices"
    assert task.labels == ()
    assert task.train[0].answer == index
    assert task.train[0].text == "q"


def answers_of(path, rows, **settings):
    return [e.answer for e in load_rows(DataConfig(source=write(path / "r.jsonl", rows), **settings)).test]


def asked(*answers, choices=("1", "2", "3")):
    return [{"prompt": "q", "choices": list(choices), "answer": answer} for answer in answers]


def test_the_whole_column_says_what_answers_are(tmp_path):
    # A zero is no choice's text, so that the column holds indices; a three is no index, so that it holds texts.
    assert answers_of(tmp_path, asked("0", "1", "2")) == [0, 1, 2] == answers_of(tmp_path, asked(0, 1, 2))
    assert answers_of(tmp_path, asked("1", "2", "3")) == [0, 1, 2]
    lettered = asked("A", "B", choices=("B", "x")) + asked("B", choices=("x", "y"))
    assert answers_of(tmp_path, lettered) == [0, 1, 1]
    assert answers_of(tmp_path, asked("x", "B", "0", choices=("x", "y"))) == [0, 1, 0]  # mixed, but each is clear


def test_answers_that_could_be_two_things_need_a_setting(tmp_path):
    rows = asked("1", "2")
    message = (
        r'line 1: column "answer" is "1", which is the text of one of the choices \["1", "2", "3"\] and the index of '
        r'another; set data\.answers = "text" or "index"$'
    )
    with pytest.raises(UserError, match=message):
        answers_of(tmp_path, rows)
    assert answers_of(tmp_path, rows, answers="text") == [0, 1]
    assert answers_of(tmp_path, rows, answers="index") == [1, 2]
    assert answers_of(tmp_path, asked(1, 3), answers="text") == [0, 2]
    with pytest.raises(
        UserError, match=r'is 3, but .* numbered 0 to 2; if it is the text of a choice, set data\.answers = "text"$'
    ):
        answers_of(tmp_path, asked(1, 3))
    with pytest.raises(UserError, match=r'is "x", not a number from 0 to 1 or the letter of a choice'):
        answers_of(tmp_path, asked("x", choices=("x", "y")), answers="index")
    with pytest.raises(UserError, match=r'is "B", which is not among the choices'):
        answers_of(tmp_path, asked("B", choices=("x", "y")), answers="text")
    with pytest.raises(UserError, match=r"is true; write the index of the right choice, from 0, or its text"):
        answers_of(tmp_path, asked(True))


def test_labels_as_pandas_and_json_write_them(tmp_path):
    rows = [{"text": "x", "label": label} for label in (1.0, 0, 2)]
    assert load_rows(DataConfig(source=write(tmp_path / "r.jsonl", rows))).labels == ("0", "1", "2")
    rows = [{"text": "x", "label": label} for label in (True, False)]
    assert load_rows(DataConfig(source=write(tmp_path / "r.jsonl", rows))).labels == ("false", "true")


def test_the_default_prompt_fits_the_kind(tmp_path):
    for row, template in [
        ({"choices": ["x", "y"], "answer": 0}, "Question: {text}\nAnswer:"),
        ({"completion": "x"}, "{text}"),
        ({"label": "x"}, "News: {text}\nTopic:"),
    ]:
        rows = [{"text": "q"} | row, {"text": "q"} | row | ({"label": "y"} if "label" in row else {})]
        config = DataConfig(source=write(tmp_path / "r.jsonl", rows))
        assert load_task(config, ANY, seed=0).template == load_rows(config).template == template
        own = config.model_copy(update={"template": "{text}?"})
        assert load_task(own, ANY, seed=0).template == load_rows(own).template == "{text}?"


def test_rows_to_measure_keep_their_order_and_a_limit_comes_first(tmp_path):
    source = write(tmp_path / "r.jsonl", [*labelled(3), {"text": None, "label": "c"}])
    task = load_rows(DataConfig(source=source, test_rows=3))
    assert [e.text for e in task.test] == ["text 0", "text 1", "text 2"]
    assert task.labels == ("a", "b", "c")
    with pytest.raises(UserError, match="line 4"):
        load_rows(DataConfig(source=source, test_rows=4))
    with pytest.raises(UserError, match=r'line 2: the label "b" is in no training row'):
        load_rows(DataConfig(source=source, test_rows=3), lambda: ("a", "c"))


def test_completions_keep_their_spaces(tmp_path):
    rows = [{"prompt": "q", "completion": " a\n"}] * 2
    task = load_task(DataConfig(source=write(tmp_path / "r.jsonl", rows)), ANY, seed=0)
    assert (task.kind, task.train[0]) == ("completion", Example("q", completion=" a\n"))


def test_holding_out_is_deterministic_and_complete(tmp_path):
    source = write(tmp_path / "r.jsonl", labelled(50))
    config = DataConfig(source=source, test_share=0.2)
    first, again, other = (load_task(config, ANY, seed) for seed in (3, 3, 4))
    assert first == again
    assert first.test != other.test
    assert len(first.test) == 10
    assert sorted(e.text for e in first.train + first.test) == sorted(r["text"] for r in labelled(50))


def test_a_label_may_be_held_out_by_chance_but_not_only_named_in_the_test_file(tmp_path):
    train = write(tmp_path / "train.jsonl", labelled(20))
    test = write(tmp_path / "test.jsonl", [*labelled(1), {"text": "t", "label": "c"}])
    with pytest.raises(UserError, match=r'test\.jsonl line 2: the label "c" is in no training row; .* a, b$'):
        load_task(DataConfig(source=train, test=test), ANY, seed=0)


def test_one_file_per_client(tmp_path):
    rows = [labelled(10, start=100 * client) for client in range(3)]
    files = [write(tmp_path / f"{client}.jsonl", rows[client]) for client in range(3)]
    task = load_task(DataConfig(clients=files, test_share=0.2), ANY, seed=0)
    assert [len(part) for part in task.parts] == [8, 8, 8]
    assert len(task.test) == 6
    assert task.part_names == files
    for client, part in enumerate(task.parts):
        assert {int(task.train[i].text.split()[1]) // 100 for i in part} == {client}
    # A client's held-out rows depend on nobody else's rows, nor on the folder.
    moved = tmp_path / "moved"
    moved.mkdir()
    files = [write(moved / "x.jsonl", rows[0]), write(moved / "y.jsonl", labelled(30, start=500))]
    other = load_task(DataConfig(clients=files, test_share=0.2), ANY, seed=0)
    assert {e.text for e in task.test if int(e.text.split()[1]) < 100} <= {e.text for e in other.test}


def test_natural_ids_make_the_parts(tmp_path):
    rows = [row | {"writer": f"w{i % 3}"} for i, row in enumerate(labelled(30))]
    config = DataConfig(source=write(tmp_path / "r.jsonl", rows), train_rows=20)
    task = load_task(config, PartitionConfig(scheme="natural", column="writer"), seed=0)
    assert task.part_names == ["w0", "w1", "w2"]
    assert sorted(index for part in task.parts for index in part) == list(range(20))
    for client, part in enumerate(task.parts):
        assert all(int(task.train[i].text.split()[1]) % 3 == client for i in part)


@pytest.mark.parametrize("held_out", [False, True])
def test_rows_without_labels_are_split_by_a_column(tmp_path, held_out):
    rows = [
        {"text": f"question {i}", "choices": ["a", "b"], "answer": i % 2, "field": f"f{i // 10}"} for i in range(40)
    ]
    source = write(tmp_path / "r.jsonl", rows)
    config = DataConfig(source=source, test=None if held_out else source)
    split = PartitionConfig(scheme="shards", shards_per_client=1, column="field", min_rows=1)
    task = load_task(config, split, seed=0)
    assert task.groups == [f"f{int(example.text.split()[1]) // 10}" for example in task.train]
    if not held_out:  # each field has ten rows, so each client has exactly one
        parts = partition(task, split, 4, 0)
        assert sorted(tuple({task.groups[i] for i in part}) for part in parts) == [(f"f{i}",) for i in range(4)]
        skewed = partition(task, PartitionConfig(alpha=0.05, column="field", min_rows=1), 4, 0)
        assert sorted(i for part in skewed for i in part) == list(range(40))
        assert max(max(Counter(task.groups[i] for i in part).values()) for part in skewed) >= 9
    with pytest.raises(UserError, match=r'no column "author".*set partition\.column'):
        load_task(config, PartitionConfig(column="author"), seed=0)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (None, r"needs partition\.column"),
        ("author", r'no column "author"; columns present: text, label, writer; set partition\.column'),
        ("writer", r'line 2: column "writer" names no client'),
    ],
)
def test_bad_natural_ids(tmp_path, column, message):
    rows = [labelled(1)[0] | {"writer": "w"}, labelled(1, start=1)[0] | {"writer": None}]
    config = DataConfig(source=write(tmp_path / "r.jsonl", rows))
    with pytest.raises(UserError, match=message):
        load_task(config, PartitionConfig(scheme="natural", column=column), seed=0)


def test_watched_rows_are_a_fifth_and_training_rows_are_drawn_by_seed(tmp_path):
    source = write(tmp_path / "rows.jsonl", labelled(50))
    config = DataConfig(source=source, test_share=0.2, train_rows=10)
    task, watch = load_watched_task(config, ANY, 0, 64)
    assert (len(task.test), len(watch)) == (8, 2)
    assert not {e.text for e in task.test} & {e.text for e in watch}
    test = write(tmp_path / "test.jsonl", labelled(2))
    drawn = [{e.text for e in load_task(config.model_copy(update={"test": test}), ANY, s).train} for s in (0, 1, 0)]
    assert drawn[0] != drawn[1]
    assert drawn[0] == drawn[2]


def test_choices_are_stripped(tmp_path):
    source = write(tmp_path / "rows.jsonl", [{"prompt": "q", "choices": [" x ", "y\n"], "answer": 0}])
    assert load_rows(DataConfig(source=source)).test[0].choices == ("x", "y")


def test_rows_that_are_held_out_but_not_measured_are_trained_on(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"text {n},{'ab'[n % 2]}\n" for n in range(100)))
    config = load_config(None, [f"data.source={tmp_path}/rows.csv", "data.test_share=0.5", "data.test_rows=10"])
    task, watch = load_watched_task(config.data, config.partition, 0, 5)
    assert (len(task.train), len(task.test), len(watch)) == (85, 10, 5)
    texts = [example.text for example in (*task.train, *task.test, *watch)]
    assert sorted(texts) == sorted(f"text {n}" for n in range(100))


def test_a_conversation_is_not_half_held_out(tmp_path):
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(3) for role in ("user", "assistant")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": turns, "id": n}) + "\n" for n in range(20)))
    settings = ["data.format=instructions", "data.test_share=0.5", "data.test_rows=4", "partition.scheme=iid"]
    config = load_config(None, [f"data.source={tmp_path}/rows.jsonl", *settings])
    task = load_task(config.data, config.partition, 0)
    assert len(task.test) == 4
    assert not {example.origin for example in task.train} & {example.origin for example in task.test}
    assert len(task.train) + 3 * len({example.origin for example in task.test}) == 60
