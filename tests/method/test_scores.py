import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfedmoe.method.importance import ib_contribution, importance
from hfedmoe.method.scores import SCORES, Evidence, score

NAN = float("nan")
EVIDENCE = Evidence(
    g=torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]),
    routed=torch.tensor([6.0, 0.0, 2.0]),
    activation=torch.tensor([3.0, NAN, 1.0]),
    taylor=torch.tensor([-0.5, NAN, 0.25]),
    ghost=torch.tensor([0.5, NAN, 2.0]),
    squares=torch.tensor([4.5, NAN, 1.0]),
    processed=torch.tensor([4.0, 3.0, 1.0]),
)


def test_every_score_by_name():
    assert torch.equal(score("ib", EVIDENCE, 0.3, 0.7), ib_contribution(EVIDENCE.g, 0.3, 0.7))
    assert torch.equal(score("importance", EVIDENCE, 0.3, 0.7), importance(EVIDENCE.g, 0.3))
    torch.testing.assert_close(score("frequency", EVIDENCE), torch.tensor([0.75, 0.0, 0.25]))
    for name in ("activation", "taylor", "ghost"):
        torch.testing.assert_close(score(name, EVIDENCE), getattr(EVIDENCE, name), equal_nan=True)


def test_of_three_tokens_worked_by_hand():
    """Gate weights 0.5, 0.25, 0.75 and norms 4, 8, 2 of expert 0's outputs; expert 1 had no token, 2 did not run."""
    terms = torch.tensor([0.5, 0.25, 0.75]) * torch.tensor([4.0, 8.0, 2.0])  # 2, 2, 1.5
    evidence = Evidence(
        EVIDENCE.g,
        EVIDENCE.routed,
        activation=torch.tensor([float(terms.sum()), 0.0, NAN]),
        squares=torch.tensor([float(terms.square().sum()), 0.0, NAN]),
        processed=torch.tensor([3.0, 0.0, 2.0]),
    )
    torch.testing.assert_close(score("activation", evidence), torch.tensor([5.5, 0.0, NAN]), equal_nan=True)
    torch.testing.assert_close(score("gated2", evidence), torch.tensor([10.25, 0.0, NAN]), equal_nan=True)
    torch.testing.assert_close(score("reap", evidence), torch.tensor([5.5 / 3, 0.0, NAN]), equal_nan=True)


def test_utility_is_tokens_times_the_root_mean_square_of_their_gradients():
    # Two tokens with gradients of norm 3 and 5: 2 x sqrt((9 + 25) / 2). Expert 1 had no token, 2 was not measured.
    evidence = Evidence(
        EVIDENCE.g,
        EVIDENCE.routed,
        ghost=torch.tensor([9.0 + 25.0, 0.0, NAN]),
        processed=torch.tensor([2.0, 0.0, 0.0]),
    )
    expected = torch.tensor([2 * ((9 + 25) / 2) ** 0.5, 0.0, NAN])
    torch.testing.assert_close(score("utility", evidence), expected, equal_nan=True)


def test_random_follows_the_generator():
    first, again, other = (score("random", EVIDENCE, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (3,)


def test_frequency_of_a_batch_without_tokens_is_zero():
    assert torch.equal(score("frequency", Evidence(EVIDENCE.g, torch.zeros(3))), torch.zeros(3))


@given(st.permutations(range(3)), st.sampled_from([name for name, row in SCORES.items() if not row.drawn]))
@settings(max_examples=40, deadline=None)
def test_permuting_experts_permutes_scores(order: list[int], name: str):
    fields = {name: values for name, values in vars(EVIDENCE).items() if name != "g"}
    permuted = Evidence(EVIDENCE.g[:, order], **{name: values[order] for name, values in fields.items()})
    torch.testing.assert_close(score(name, permuted), score(name, EVIDENCE)[order], equal_nan=True)


def test_an_unknown_name_is_an_error():
    with pytest.raises(
        ValueError, match="known: ib, importance, frequency, random, activation, gated2, reap, taylor, ghost, utility"
    ):
        score("magic", EVIDENCE)


@pytest.mark.parametrize("name", [name for name, row in SCORES.items() if row.needs])
def test_missing_evidence_is_an_error(name: str):
    with pytest.raises(ValueError, match=f'"{name}" needs'):
        score(name, Evidence(EVIDENCE.g, EVIDENCE.routed))


def test_what_the_router_alone_shows_can_choose_within_the_pass():
    later = [name for name, row in SCORES.items() if not row.within_pass]
    assert later == ["activation", "gated2", "reap", "taylor", "ghost", "utility"]
    assert [name for name, row in SCORES.items() if row.needs_backward] == ["taylor", "ghost", "utility"]
