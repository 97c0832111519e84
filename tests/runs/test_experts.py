"""The expert vectors of every round and client in experts.npy."""

import errno

import numpy as np
import pytest
import torch

from hfedmoe.errors import UserError
from hfedmoe.runs import experts
from tests.runs.writing import append_experts


def test_a_layer_with_fewer_experts_is_padded_and_rows_stay_in_their_order(run):
    assert run.read_expert_rows() is None
    append_experts(run, 1, [2, 1], [4], [[0.1, 0.2, 0.3]], [[1, 2, 3]], [[True, False, True]], [[True, False, False]])
    usage = torch.tensor([[0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])
    append_experts(run, 2, [2, 1], [9, 0], usage, usage, usage > 0, list(usage > 0.6))
    rows = run.read_expert_rows()
    assert rows["round"].tolist() == [1, 2, 2]
    assert rows["client"].tolist() == [4, 9, 0]
    nan = np.nan
    expected = np.array([[[0.1, 0.2], [0.3, nan]], [[0.4, 0.5], [0.6, nan]], [[0.7, 0.8], [0.9, nan]]], np.float32)
    np.testing.assert_array_equal(rows["usage"], expected)
    assert rows["usage"].dtype == np.float32
    np.testing.assert_array_equal(rows["resident"][0], [[True, False], [True, False]])
    np.testing.assert_array_equal(rows["trained"][2], [[True, True], [True, False]])


def test_experts_of_the_same_round_are_replaced(run):
    for value in (1.0, 2.0):
        append_experts(run, 1, [1], [0], [[value]], [[value]], [[True]], [[True]])
    assert run.read_expert_rows()["usage"].tolist() == [[[2.0]]]


@pytest.mark.parametrize("cut", [0, 3, 40, -40, -1])
def test_damaged_experts_are_a_user_error_unless_no_row_is_needed(run, cut):
    append_experts(run, 1, [2], [0, 1], *[[[1, 2]] * 2] * 2, *[[[1, 0]] * 2] * 2)
    path = run.path / "experts.npy"
    path.write_bytes(path.read_bytes()[:cut])
    for use in (run.read_expert_rows, lambda: run.rewind(1), lambda: append_experts(run, 2, [2], [])):
        with pytest.raises(
            UserError, match=r'experts.npy: damaged .* resume the run: .*"prior".*--as client'
        ) as caught:
            use()
        assert "\n" not in str(caught.value)
    run.rewind(0)
    assert run.read_expert_rows() is None


@pytest.mark.parametrize("table", [np.zeros(3), np.zeros((2, 2)), np.zeros(2, [("round", int)])])
def test_another_table_in_the_place_of_the_experts_is_refused(run, table):
    np.save(run.path / "experts.npy", table)
    with pytest.raises(UserError, match=r"experts.npy: damaged \(its header is that of another table\)"):
        run.read_expert_rows()


def test_experts_can_be_read_while_their_first_round_goes_on(run):
    with run.expert_rows(1, [2]) as add:
        assert len(np.load(run.path / "experts.npy")) == 0
        add(0, [1, 2], [0, 0], [1, 1], [1, 0])
        assert run.read_expert_rows()["usage"].shape == (0, 1, 2)


@pytest.mark.parametrize("which", [1, 2])
def test_a_commit_that_fails_leaves_the_rows_before_it(run, monkeypatch, which):
    append_experts(run, 1, [2], [0], [[1, 2]], [[0, 0]], [[1, 1]], [[1, 0]])
    before, calls = (run.path / "experts.npy").read_bytes(), iter([1, 2])

    def fail(file):
        file.flush()
        if next(calls) == which:  # the second one comes after the header was written
            raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(experts, "sync", fail)
        with pytest.raises(UserError, match=r"experts.npy: cannot be written \(broken\)"):
            append_experts(run, 2, [2], [0], [[3, 4]], [[0, 0]], [[1, 1]], [[1, 0]])
    assert (run.path / "experts.npy").read_bytes() == before


def test_what_fails_elsewhere_is_not_blamed_on_the_experts(run):
    with pytest.raises(ConnectionResetError), run.expert_rows(1, [2]):
        raise ConnectionResetError


def test_expert_rows_of_a_round_that_fails_are_forgotten(run):
    append_experts(run, 1, [2], [0], [[1, 2]], [[0, 0]], [[1, 1]], [[1, 0]])
    before = (run.path / "experts.npy").read_bytes()

    def fail() -> None:
        with run.expert_rows(2, [2]) as add:
            add(0, [1, 2], [0, 0], [1, 1], [1, 0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (run.path / "experts.npy").read_bytes() == before
    rows = np.load(run.path / "experts.npy")
    assert rows["usage"].tolist() == [[[1, 2]]]
