"""What an owner allows reaches the node config and comes back."""

import pytest

from hfedmoe.client.policy import ANYTHING, Policy
from hfedmoe.errors import UserError


@pytest.mark.parametrize(
    "policy",
    [
        ANYTHING,
        Policy(max_experts=10, max_steps=4, max_seconds=2.5, min_batch=2, models=("/a", "/b"), measure=False),
        Policy(tune=False),
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
        ({"tune": "no"}, "tune = 'no': give true or false"),
    ],
)
def test_bad_values_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Policy.of(settings)
