"""What an owner allows reaches the node config and comes back."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from flwr.app import RecordDict

from hfedmoe.client.policy import ANYTHING, Policy, PolicyError
from hfedmoe.client.spent import FIRST_PASS, ROUNDS, TIMES, Spent, counted
from hfedmoe.config import DataConfig
from hfedmoe.data.terms import Terms, task_key
from hfedmoe.errors import UserError
from hfedmoe.wire.trouble import POLICY_TASK


@pytest.mark.parametrize(
    "policy",
    [
        ANYTHING,
        Policy(max_experts=10, max_steps=4, max_seconds=2.5, min_batch=2, models=("/a", "/b"), measure=False),
        Policy(tune=False),
        Policy(columns=("text", "the, label"), labels=("acq", "crude")),
    ],
)
def test_a_node_config_says_the_policy(policy: Policy) -> None:
    assert Policy.of(policy.node_config()) == policy
    assert all(isinstance(value, bool | int | float | str) for value in policy.node_config().values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max-steps": 0}, "max-steps = 0: give a number above 0"),
        ({"max-experts": True}, "max-experts = True"),
        ({"min-batch": 1.5}, "min-batch = 1.5"),
        ({"measure": 1}, "measure = 1: give true or false"),
        ({"columns": " ,"}, "columns = ' ,': give names, with commas between them"),
        ({"tune": "no"}, "tune = 'no': give true or false"),
    ],
)
def test_bad_values_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Policy.of(settings)


TASK = Terms("classification", "classification", ("acq", "crude", "earn"))


@pytest.mark.parametrize(
    ("policy", "config", "terms", "said"),
    [
        (Policy(columns=("label", "text")), {}, TASK, None),
        (Policy(columns=("label", "text")), {"label": "name"}, TASK, "reads name of a file .* device are label,text"),
        (Policy(columns=("label", "text")), {"text": "note"}, TASK, "reads note"),
        (Policy(columns=("label", "text")), {}, Terms("completion", "completion"), "reads completion"),
        (Policy(columns=("label", "text")), {}, Terms("instructions", "completion"), "reads .*instruction"),
        (Policy(labels=("earn", "acq", "crude")), {"label": "name"}, TASK, None),
        (Policy(labels=("acq", "crude")), {}, TASK, "run's labels are acq,crude,earn .* device are acq,crude"),
        (Policy(labels=("acq", "crude", "earn", "ship")), {}, TASK, "run's labels are acq,crude,earn"),
        (Policy(labels=("acq",)), {}, Terms("completion", "completion"), "run's labels are none"),
    ],
)
def test_an_owner_says_which_columns_are_read_and_which_labels_there_are(
    policy: Policy, config: dict[str, str], terms: Terms, said: str | None
) -> None:
    if said is None:
        policy.check_task(DataConfig(**config), terms)
        return
    with pytest.raises(PolicyError, match=said) as caught:
        policy.check_task(DataConfig(**config), terms)
    assert caught.value.code == POLICY_TASK


def test_a_task_stays_the_same_when_a_run_goes_on_and_is_another_one_with_other_columns_or_labels() -> None:
    first = task_key(DataConfig(), TASK)
    found = DataConfig(format="classification", labels=["acq", "crude", "earn"], source="a.csv", train_rows=5)
    assert task_key(found, replace(TASK, chat_date="2026-11-28")) == first
    others = [
        DataConfig(text="note"),
        DataConfig(label="name"),
        DataConfig(max_tokens=8),
        DataConfig(template="{text}"),
    ]
    keys = {task_key(config, TASK) for config in others}
    keys |= {task_key(DataConfig(), replace(TASK, labels=("acq", "crude")))}
    keys |= {task_key(DataConfig(labels={"acq": "deal", "crude": "oil", "earn": "gain"}), TASK)}
    assert len(keys - {first}) == 6


def ticking(*seconds: float) -> Iterator[float]:
    """The readings of a clock around works of so many seconds."""
    now = 0.0
    for taken in seconds:
        yield now
        yield (now := now + taken)


def test_a_round_may_take_its_limits_three_times_and_the_last_time_only_what_is_left() -> None:
    state, clock = RecordDict(), ticking(9.0, 0.0, 10.0, 8.0, 3.0, 1.0)
    policy = Policy(max_steps=4, max_seconds=10.0)

    def work(round: int, steps: int) -> Policy:
        with counted(state, policy, round, steps, lambda: next(clock)) as allowed:
            return allowed

    assert work(1, 4) == policy  # 9 s
    with pytest.raises(MemoryError), counted(state, policy, 1, 3, lambda: next(clock)):  # counts as well
        raise MemoryError
    assert Spent.of(state) == Spent({1: 7}, {1: 9.0})
    assert work(FIRST_PASS, 4) == policy  # 10 s, which are not the round's
    with pytest.raises(PolicyError, match=r"round 1 again, which has had 7 steps; max-steps .* is 4, and 3 times"):
        work(1, 6)
    assert work(1, 2) == policy  # 8 s
    assert work(1, 2).max_seconds == 10.0  # 3 s
    assert work(1, 1).max_seconds == 10.0  # 1 s, of 10 that are left
    assert Spent.of(state).seconds == {1: 21.0, FIRST_PASS: 10.0}


def test_seconds_of_a_round_end_too_and_a_round_long_over_does_not_begin_again() -> None:
    state, policy = RecordDict(), Policy(max_seconds=10.0)

    def work(round: int, seconds: float) -> float | None:
        clock = ticking(seconds)
        with counted(state, policy, round, 100, lambda: next(clock)) as allowed:
            return allowed.max_seconds

    assert [work(1, 11.0), work(1, 11.0), work(1, 9.0)] == [10.0, 10.0, 8.0]
    with pytest.raises(PolicyError, match=r"round 1 again, which has had 31 s; max-seconds .* is 10, and 3 times"):
        work(1, 1.0)
    for round in range(2, ROUNDS + 2):
        assert work(round, 1.0) == 10.0
    with pytest.raises(PolicyError, match="round 1 again, which is long over"):
        work(1, 1.0)
    assert len(Spent.of(state).steps) == ROUNDS
    assert TIMES == 3


def test_without_limits_nothing_is_counted() -> None:
    state = RecordDict()
    for _ in range(9):
        with counted(state, ANYTHING, 1, 100, lambda: 0.0) as allowed:
            assert allowed is ANYTHING
    assert not state
