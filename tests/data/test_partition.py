"""Splits are complete, disjoint, large enough and repeatable."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfedmoe.config import PartitionConfig
from hfedmoe.data.example import Example
from hfedmoe.data.partition import label_counts, partition
from hfedmoe.data.task import Task
from hfedmoe.errors import UserError


def task_of(answers, labels=3, **kwargs):
    words = tuple("abcdefgh"[:labels])
    rows = [Example(f"text {i}", words, answer) for i, answer in enumerate(answers)]
    return Task("t", "classification", "{text}", words, rows, [], **kwargs)


@settings(max_examples=25, deadline=None)
@given(
    answers=st.lists(st.integers(0, 2), min_size=24, max_size=120),
    scheme=st.sampled_from(["dirichlet", "iid", "shards"]),
    clients=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_every_row_goes_to_exactly_one_client(answers, scheme, clients, seed):
    task = task_of(answers)
    config = PartitionConfig(scheme=scheme, alpha=1.0, min_rows=3)
    parts = partition(task, config, clients, seed)
    assert sorted(row for part in parts for row in part) == list(range(len(answers)))
    assert len(parts) == clients
    assert min(map(len, parts)) >= 3
    assert parts == partition(task, config, clients, seed)
    counts = label_counts(task, parts)
    assert [sum(row) for row in counts] == [len(part) for part in parts]
    assert [sum(column) for column in zip(*counts, strict=True)] == [answers.count(label) for label in range(3)]


def test_seeds_differ_and_global_random_state_is_left_alone():
    task = task_of([i % 3 for i in range(90)])
    for scheme in ("dirichlet", "iid", "shards"):
        config = PartitionConfig(scheme=scheme, min_rows=1)
        state = random.getstate()
        assert partition(task, config, 3, 0) != partition(task, config, 3, 1)
        assert random.getstate() == state


def test_small_alpha_is_skewed_and_a_shard_has_few_labels():
    task = task_of([i % 8 for i in range(800)], labels=8)
    skewed = label_counts(task, partition(task, PartitionConfig(alpha=0.05, min_rows=4), 4, 0))
    even = label_counts(task, partition(task, PartitionConfig(alpha=100.0), 4, 0))
    assert max(map(max, skewed)) > 95
    assert max(map(max, even)) < 50
    shards = label_counts(task, partition(task, PartitionConfig(scheme="shards"), 4, 0))
    assert all(sum(count > 0 for count in row) <= 2 for row in shards)


def test_parts_of_files_are_kept():
    task = task_of([0, 1, 2, 0], parts=[[0, 2], [1, 3]], part_names=["x.csv", "y.csv"])
    assert partition(task, PartitionConfig(min_rows=2), 2, 0) == [[0, 2], [1, 3]]
    with pytest.raises(UserError, match=r"has 2 clients, but clients\.count is 3; set clients\.count=2"):
        partition(task, PartitionConfig(min_rows=2), 3, 0)
    with pytest.raises(UserError, match=r"client x\.csv has 2 training rows, fewer than partition\.min_rows=3"):
        partition(task, PartitionConfig(min_rows=3), 2, 0)


@pytest.mark.parametrize(
    ("settings", "clients", "message"),
    [
        ({}, 8, r"8 clients with partition\.min_rows=16 need 128 training rows, but there are 60; lower"),
        ({"alpha": 1e-3, "min_rows": 10}, 5, r"partition\.alpha=0\.001: no draw gave all 5 clients .*raise partition"),
        ({"scheme": "shards", "shards_per_client": 40, "min_rows": 1}, 2, "need 80 training rows"),
        ({"scheme": "natural", "min_rows": 1}, 2, r"set partition\.column"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_impossible_splits_say_what_to_change(settings, clients, message):
    with pytest.raises(UserError, match=message):
        partition(task_of([i % 3 for i in range(60)]), PartitionConfig(**settings), clients, 0)


def test_tasks_without_labels_are_split_evenly_or_not_at_all():
    rows = [Example(f"q{i}", ("x", "y"), i % 2) for i in range(40)]
    task = Task("t", "choices", "{text}", (), rows, [])
    parts = partition(task, PartitionConfig(scheme="iid"), 2, 0)
    assert [len(part) for part in parts] == [20, 20]
    assert label_counts(task, parts) == [[], []]
    with pytest.raises(UserError, match=r"a choices task has none; name a column to split by \(partition\.column\)"):
        partition(task, PartitionConfig(), 2, 0)


def test_parts_are_sorted_shards_take_what_is_left_over_and_small_parts_are_refused():
    task = task_of([0] * 5 + [1] * 6, labels=2)
    parts = partition(task, PartitionConfig(scheme="shards", shards_per_client=1, min_rows=1), 2, 0)
    assert all(part == sorted(part) for part in parts)
    assert sorted(label_counts(task, parts)) == [[0, 6], [5, 0]]  # the row left over joins those of its label
    with pytest.raises(UserError, match=r"gets 2 rows, fewer than partition\.min_rows=3"):
        partition(
            task_of([0] * 5 + [1] * 4), PartitionConfig(scheme="shards", shards_per_client=2, min_rows=3), 3, 0
        )  # fmt: skip


def test_even_parts_differ_by_one_row():
    parts = partition(task_of([i % 2 for i in range(11)]), PartitionConfig(scheme="iid", min_rows=1), 4, 0)
    assert sorted(map(len, parts)) == [2, 3, 3, 3]
