"""Declared labels: rows that lack one are trained and measured among the same choices."""

import json

import pytest

from hfedmoe.config import DataConfig, PartitionConfig, config_from_tree
from hfedmoe.data.tasks import load_rows, load_task
from hfedmoe.data.terms import own_task, terms_of
from hfedmoe.errors import UserError
from hfedmoe.runs.settings import config_toml

ANY = PartitionConfig()


def rows(path, labels):
    path.write_text("".join(json.dumps({"text": f"text {i}", "label": label}) + "\n" for i, label in enumerate(labels)))
    return str(path)


def data(**settings):
    return config_from_tree({"data": settings}, "test").data


def test_a_site_that_lacks_a_class_is_trained_and_measured_among_all(tmp_path):
    source = rows(tmp_path / "r.jsonl", ["no"] * 20)  # without a declaration this is refused: one label
    with pytest.raises(UserError, match='every row has the label "no"'):
        load_task(data(source=source), ANY, seed=0)
    config = data(source=source, labels=["yes", "no", "perhaps"])
    task = load_task(config, ANY, seed=0)
    assert task.labels == ("no", "perhaps", "yes")
    assert {example.choices for example in task.train + task.test} == {("no", "perhaps", "yes")}
    assert {example.answer for example in load_rows(config).test} == {0}
    assert load_rows(config, trained_labels=lambda: ("a", "b")).labels == task.labels


def test_a_table_says_what_the_model_answers(tmp_path):
    source = rows(tmp_path / "r.jsonl", [1, 0, 1, 0, True])
    config = data(source=source, labels={"0": "bad", "1.0": "good", "true": "sure"}, test=source)
    task = load_task(config, ANY, seed=0)
    assert task.labels == ("0", "1.0", "true")
    assert {example.choices[example.answer] for example in task.train} == {"bad", "good", "sure"}
    listed = data(source=source, labels=[0, 1, True], label_words={"1": "good"}, test=source)
    assert load_task(listed, ANY, seed=0).train[0].choices == ("0", "good", "true")
    device = own_task(source, config, terms_of(task, config, False))
    assert device.train[0].choices == task.train[0].choices


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": ["a"]}, "data.labels: name at least two labels"),
        ({"labels": ["a", "a "]}, 'data.labels: names "a" twice'),
        ({"labels": ["1", "1.0"]}, 'data.labels: names "1.0" twice'),
        ({"labels": ["a", " "]}, "data.labels: a label has no visible characters"),
        ({"labels": {"a": "x", "b": "x"}}, 'data.labels: "a" and "b" share the word "x"'),
        ({"labels": {"a": "x", "b": " "}}, 'data.labels: the word for "b" is empty'),
        ({"labels": {"a": "x", "b": "y"}, "label_words": {"a": "z"}}, "labels says the words already"),
        ({"labels": ["a", "b"], "label_words": {"c": "z"}}, 'data.labels lacks the label "c"'),
        ({"labels": ["a", "c"]}, 'line 2: the label "b" is not in data.labels: a, c'),
        ({"labels": ["a", "b"], "format": "reuters-r8"}, "data.labels: reuters-r8 has its own labels"),
        ({"labels": ["a", "b"], "format": "completion", "completion": "label"}, "a completion task has no labels"),
    ],
)
def test_a_declaration_that_cannot_be_meant_is_one_line(tmp_path, settings, message):
    source = rows(tmp_path / "r.jsonl", ["a", "b", "a", "b"])
    with pytest.raises(UserError) as error:
        load_task(data(source=source, **settings), ANY, seed=0)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_declared_labels_are_written_and_read_again():
    for labels in (["yes", "no"], {"yes": "good", "no": "bad"}):
        config = config_from_tree({"data": {"labels": labels}}, "test")
        assert f"{'labels = [' if isinstance(labels, list) else '[data.labels]'}" in config_toml(config)
    assert DataConfig().labels is None
