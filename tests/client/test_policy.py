"""What the owner of a device allows."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hfedmoe.client.policy import Policy
from hfedmoe.errors import UserError
from hfedmoe.fleet.allowed import Allowed
from tests.federation import Federation, tiny_config
from tests.fleet.places import hfedmoe

FULL = Policy(max_experts=9, max_steps=20, max_seconds=1.5, min_batch=4, models=("/a", "/b c"))


def test_the_node_config_of_plain_flower_says_the_same() -> None:
    written = FULL.node_config()
    assert written == {"max-experts": 9, "max-steps": 20, "max-seconds": 1.5, "min-batch": 4, "models": "/a:/b c"}
    assert Policy.of(written) == FULL
    assert Policy.of({"partition-id": 0}) == Policy()
    allowed = Allowed(Path("/x"), 2, policy=FULL)
    assert Allowed.from_json(json.loads(json.dumps(allowed.to_json()))) == allowed


@pytest.mark.parametrize("wrong", [0, -1, True, "many", 2.5])
def test_wrong_limits_are_named(wrong: object) -> None:
    with pytest.raises(UserError, match=r"this node's max-steps = .*: give a number above 0"):
        Policy.of({"max-steps": wrong})


def test_the_shorter_deadline_counts() -> None:
    policy = Policy(max_seconds=5.0)
    assert [policy.deadline(seconds) for seconds in (None, 3.0, 9.0)] == [5.0, 3.0, 5.0]
    assert Policy().deadline(None) is None


def test_a_device_stops_after_its_owners_seconds_and_the_server_takes_its_update() -> None:
    run = Federation(None, tiny_config("train.steps=5", "federation.rounds=1", "evaluation.watch_rows=0"))
    device = run.devices[1]
    ticks = iter(range(10**6))
    device.policy, device.clock = replace(FULL, max_seconds=12.0), lambda: float(next(ticks))
    run.run()
    done = {total.name: total for total in run.server.keeper.final_totals()}
    assert done["client 1"].deadline_s == 12.0
    assert 0 < done["client 1"].steps < 5
    assert done["client 0"].deadline_s is None


def test_two_ways_to_name_the_model_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--data", "x.csv", "--model", "a", "--models", "b")
    assert hfedmoe("join", tmp_path / "x.invite", *arguments) == 2
    assert "--model says where the model of every run is" in capsys.readouterr().err
