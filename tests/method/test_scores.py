import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfedmoe.method.importance import ib_contribution, importance
from hfedmoe.method.scores import NEEDS, SCORES, Evidence, RunningMean, RunningScore, score

NAN = float("nan")
EVIDENCE = Evidence(
    g=torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]),
    routed=torch.tensor([6.0, 0.0, 2.0]),
    activation=torch.tensor([3.0, NAN, 1.0]),
    taylor=torch.tensor([-0.5, NAN, 0.25]),
)


def test_every_score_by_name():
    assert torch.equal(score("ib", EVIDENCE, 0.3, 0.7), ib_contribution(EVIDENCE.g, 0.3, 0.7))
    assert torch.equal(score("importance", EVIDENCE, 0.3, 0.7), importance(EVIDENCE.g, 0.3))
    torch.testing.assert_close(score("frequency", EVIDENCE), torch.tensor([0.75, 0.0, 0.25]))
    for name in ("activation", "taylor"):
        torch.testing.assert_close(score(name, EVIDENCE), getattr(EVIDENCE, name), equal_nan=True)
    assert set(NEEDS) == set(SCORES)


def test_random_follows_the_generator():
    first, again, other = (score("random", EVIDENCE, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (3,)


def test_frequency_of_a_batch_without_tokens_is_zero():
    assert torch.equal(score("frequency", Evidence(EVIDENCE.g, torch.zeros(3))), torch.zeros(3))


@given(st.permutations(range(3)), st.sampled_from(sorted(set(SCORES) - {"random"})))
@settings(max_examples=40, deadline=None)
def test_permuting_experts_permutes_scores(order: list[int], name: str):
    assert EVIDENCE.activation is not None
    assert EVIDENCE.taylor is not None
    permuted = Evidence(
        EVIDENCE.g[:, order], EVIDENCE.routed[order], EVIDENCE.activation[order], EVIDENCE.taylor[order]
    )
    torch.testing.assert_close(score(name, permuted), score(name, EVIDENCE)[order], equal_nan=True)


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="known: ib, importance, frequency, random, activation, taylor"):
        score("magic", EVIDENCE)


@pytest.mark.parametrize("name", [name for name, need in NEEDS.items() if need])
def test_missing_evidence_is_an_error(name: str):
    with pytest.raises(ValueError, match=f'"{name}" needs'):
        score(name, Evidence(EVIDENCE.g, EVIDENCE.routed))


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
