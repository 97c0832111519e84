"""What a device's worker takes from a server, and what not."""

import logging
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, Metadata, RecordDict

from hfedmoe.data.terms import Terms
from hfedmoe.fleet.allowed import Allowed
from hfedmoe.fleet.worker import Worker
from hfedmoe.wire import checks
from hfedmoe.wire.messages import DESCRIBE, PLAN, describe_request, facts_of, plan_request
from tests.deployment.nodes import rows_file
from tests.fleet.places import save_tiny

RUN = "a" * 32
CONFIG = '[model]\nname = "{model}"\n[clients]\ncount = 4\n[data]\nsource = "/etc/passwd"\n{more}'
TERMS = Terms("classification", "classification", ("acq", "crude", "earn"), True)


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    own = rows_file(tmp_path / "own.csv", "earn", "acq", rows=6)
    return Worker(Allowed(own, 16, str(save_tiny(tmp_path / "model"))), 2, tmp_path / "memory")


def ask(worker: Worker, kind: str, content: RecordDict, config: str, **node: Any) -> Message:
    context = Context(5, 6, node, RecordDict(), {"config": config, "run": RUN})
    metadata = Metadata(5, "1", 0, 6, "", "", 0.0, 60.0, kind)
    before = dict(context.run_config)
    reply = worker.answer(Message(content, metadata=metadata), context)  # type: ignore[call-overload]
    assert context.run_config == before  # Flower gives it back with the next message
    return reply


def describe(worker: Worker, model: str = "theirs/model", more: str = "", **node: Any) -> Message:
    return ask(worker, DESCRIBE, describe_request(TERMS.to_json()), CONFIG.format(model=model, more=more), **node)


def test_number_data_model_and_budget_are_the_devices_own(worker: Worker, tmp_path: Path) -> None:
    reply = describe(worker, **{"partition-id": 0, "data": "/etc/passwd", "budget": 32, "trust-remote-code": True})
    facts = facts_of(reply)
    assert (facts["client"], facts["examples"], facts["budget"]) == (2, 6, 16)
    plan = ask(worker, PLAN, plan_request(1), CONFIG.format(model="theirs/model", more=""))
    assert "resident" in facts_of(plan)
    # Terms and budget came from the device's own disk: Flower's state of the second message was empty.
    assert (tmp_path / "memory" / RUN / "now").is_file()


def test_a_device_may_be_invited_after_the_run_began(worker: Worker) -> None:
    config = CONFIG.format(model="theirs/model", more="").replace("count = 4", "count = 2")
    reply = ask(worker, DESCRIBE, describe_request(TERMS.to_json()), config)
    assert facts_of(reply)["client"] == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("[train]\nsteps = 1000000000", "train.steps = 1000000000 is more than 100000"),
        ("[train]\nnonsense = 1", "nonsense"),
    ],
)
def test_what_the_owner_does_not_allow_is_refused_with_a_code_only(
    worker: Worker, more: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        reply = describe(worker, more=more)
    with pytest.raises(checks.TroubleError, match="cannot take part with its settings"):
        checks.trouble(reply)
    assert said in caplog.text
    assert set(facts_of(reply)) == {"status", "code", "count"}


def test_code_of_a_checkpoint_is_never_run(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    config = '[model]\nname = "theirs"\ntrust_remote_code = true\n[clients]\ncount = 4\n'
    with caplog.at_level(logging.ERROR):
        reply = ask(worker, DESCRIBE, describe_request(TERMS.to_json()), config, **{"trust-remote-code": True})
    with pytest.raises(checks.TroubleError):
        checks.trouble(reply)
    assert "which devices refuse" in caplog.text


def test_without_a_model_of_its_own_a_device_opens_packaged_ones_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = rows_file(tmp_path / "own.csv", "earn", "acq", rows=6)
    worker = Worker(Allowed(own, "50%"), 2, tmp_path / "memory")
    theirs = save_tiny(tmp_path / "model")
    with caplog.at_level(logging.ERROR):
        reply = describe(worker, model=str(theirs))
    with pytest.raises(checks.TroubleError):
        checks.trouble(reply)
    assert "say with --model where this device has it" in caplog.text
    assert facts_of(describe(worker, model="tiny"))["client"] == 2
