import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfedmoe.method.running import RunningMean, RunningScore

NAN = float("nan")


def test_running_score_skips_what_was_not_observed():
    running = RunningScore(4)
    assert torch.equal(running.value(), torch.zeros(4))
    running.update(torch.tensor([1.0, 4.0, NAN, NAN]))
    running.update(torch.tensor([3.0, NAN, NAN, float("inf")]))
    # observed means: 2 and 4; the two unobserved experts get the mean of these
    assert torch.equal(running.value(), torch.tensor([2.0, 4.0, 3.0, 3.0]))


def test_running_mean_is_weighted_and_shows_the_unobserved():
    running = RunningMean(2)
    running.update(torch.tensor([1.0, NAN]), weight=8)
    running.update(torch.tensor([5.0, NAN]), weight=24)
    torch.testing.assert_close(running.value(), torch.tensor([4.0, NAN]), equal_nan=True)  # (8 * 1 + 24 * 5) / 32


@given(st.integers(0, 1000), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_saved_and_restored_continues_bit_for_bit(seed: int, cut: int):
    batches = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))
    batches[batches > 1] = NAN
    whole, part = RunningScore(5), RunningScore(5)
    for number, batch in enumerate(batches):
        if number == cut:
            part = RunningScore.from_state(part.state())
        whole.update(batch)
        part.update(batch)
    assert type(part) is RunningScore
    assert torch.equal(whole.value(), part.value())
    torch.testing.assert_close(RunningMean.from_state(whole.state()).value(), batches.nanmean(0), equal_nan=True)


def test_state_is_a_copy():
    running = RunningMean(1)
    state = running.state()
    running.update(torch.ones(1))
    assert state["mean"].item() == 0
    RunningMean.from_state(state).update(torch.ones(1))
    assert state["weight"].item() == 0


def test_running_mean_checks_its_arguments():
    with pytest.raises(ValueError, match="one per expert"):
        RunningMean(2).update(torch.zeros(3))
    with pytest.raises(ValueError, match="weight=0"):
        RunningMean(2).update(torch.zeros(2), weight=0)
    with pytest.raises(ValueError, match="state"):
        RunningMean.from_state({"mean": torch.zeros(2)})
