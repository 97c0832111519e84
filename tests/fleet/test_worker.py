"""What a device's worker takes from a server, and what not."""

import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, Metadata, RecordDict

from hfedmoe.client import scoring
from hfedmoe.client.policy import ANYTHING, Policy
from hfedmoe.client.tuning import Tuned
from hfedmoe.config import config_from_text
from hfedmoe.data.terms import Terms
from hfedmoe.fleet.allowed import Allowed
from hfedmoe.fleet.asked import MOST
from hfedmoe.fleet.check import check_offer
from hfedmoe.fleet.device import DeviceFolder
from hfedmoe.fleet.offer import Offer, versions
from hfedmoe.fleet.worker import Worker
from hfedmoe.models.loading import load
from hfedmoe.models.wrapping import wrap
from hfedmoe.moe.payload import global_tensors, pack
from hfedmoe.wire import checks
from hfedmoe.wire.messages import (
    DESCRIBE,
    MEASURE,
    PERSONAL,
    PLAN,
    TENSORS,
    TRAIN,
    TUNE,
    describe_request,
    facts_of,
    plan_request,
    train_request,
    unpack_bits,
)
from hfedmoe.wire.same import Digests
from hfedmoe.wire.trouble import FAULT, SETTINGS
from tests.deployment.nodes import check_holds_no_row, rows_file
from tests.fleet.places import save_tiny

RUN = "a" * 32
CONFIG = '[model]\nname = "{model}"\n[clients]\ncount = 4\n[data]\nsource = "/etc/passwd"\n{more}'
TERMS = Terms("classification", "classification", ("acq", "crude", "earn"), True)


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    own = rows_file(tmp_path / "own.csv", "earn", "acq", rows=6)
    return Worker(Allowed(own, 16, str(save_tiny(tmp_path / "model"))), 2, DeviceFolder(tmp_path))


def ask(worker: Worker, kind: str, content: RecordDict, config: str, run: str = RUN, **node: Any) -> Message:
    context = Context(5, 6, node, RecordDict(), {"config": config, "run": run})
    metadata = Metadata(5, "1", 0, 6, "", "", 0.0, 60.0, kind)
    before = dict(context.run_config)
    reply = worker.answer(Message(content, metadata=metadata), context)  # type: ignore[call-overload]
    check_holds_no_row(reply, worker._folder.path / "own.csv")
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


def test_a_device_that_stays_for_a_run_with_another_tokenizer_refuses_it_by_name(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    assert facts_of(describe(worker))["client"] == 2
    other = describe_request(TERMS.to_json(), Digests(tokenizer="0" * 32))
    reply = ask(worker, DESCRIBE, other, CONFIG.format(model="theirs/model", more=""), run="b" * 32)
    with pytest.raises(checks.TroubleError, match="its tokenizer is not the server's; give both the same checkpoint"):
        checks.trouble(reply)
    assert set(facts_of(reply)) == {"status", "code", "count"}
    assert "model: its tokenizer is not the server's; get the same model" in caplog.text


def test_a_device_may_be_invited_after_the_run_began(worker: Worker) -> None:
    config = CONFIG.format(model="theirs/model", more="").replace("count = 4", "count = 2")
    reply = ask(worker, DESCRIBE, describe_request(TERMS.to_json()), config)
    assert facts_of(reply)["client"] == 2


@pytest.mark.parametrize(
    ("policy", "more", "said", "told"),
    [
        (Policy(max_steps=3), "[train]\nsteps = 4", "max-steps of this device is 3", "allows fewer steps per round"),
        (Policy(min_batch=5), "[train]\nbatch_size = 4", "min-batch of this device is 5", "no batches as small as"),
        (Policy(min_batch=7), "[train]\nbatch_size = 8", "6 rows, fewer than one batch", "no batches as small as"),
        (Policy(max_experts=7), "", "needs 8 experts on this device .* its max-experts is 7", "allows fewer experts"),
        (
            Policy(max_experts=31),
            '[method]\nresidency = "all"',
            "needs 32 experts on this device",
            "allows fewer experts",
        ),
    ],
    ids=["steps", "batch", "rows", "experts", "all experts"],
)
def test_beyond_the_owners_limits_the_setting_is_named_and_the_server_gets_a_code(
    policy: Policy, more: str, said: str, told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = rows_file(tmp_path / "own.csv", "earn", "acq", rows=6)
    model = str(save_tiny(tmp_path / "model"))
    reply = describe(Worker(Allowed(own, 16, model, policy=policy), 2, DeviceFolder(tmp_path)), more=more)
    with pytest.raises(checks.TroubleError, match=told):
        checks.trouble(reply)
    assert set(facts_of(reply)) == {"status", "code", "count"}
    assert re.search(said, caplog.text)
    offer = Offer(versions(), RUN, CONFIG.format(model="theirs/model", more=more), TERMS.to_json(), "", "")
    found = [one for one in check_offer(offer, Allowed(own, 16, model, policy=policy)) if one.code.startswith("policy")]
    assert [re.search(said, one.text) is not None for one in found] == [True]


@pytest.mark.parametrize(
    ("config", "terms", "said"),
    [
        (CONFIG, "[" * 100_000, "the server's task cannot be read (it is nested too deep)"),
        ("a = " + "[" * 20_000, TERMS.to_json(), "the server's configuration: is nested too deep"),
        (CONFIG, TERMS.to_json().replace('["acq"', '[["acq"]'), "the server's task cannot be read (a label is not"),
    ],
    ids=["terms", "config", "label"],
)
def test_what_is_nested_too_deep_is_refused_in_one_line(
    config: str, terms: str, said: str, tmp_path: Path, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    config = config.replace("{model}", "tiny").replace("{more}", "")
    _, found = check_offer(Offer(versions(), RUN, config, terms, "", ""), worker._allowed)
    assert (found.fits, found.code, found.about) == (False, SETTINGS, "run")
    assert said in found.text
    with pytest.raises(checks.TroubleError):
        checks.trouble(ask(worker, DESCRIBE, describe_request(terms), config))
    assert said.split("(")[-1].rstrip(")") in caplog.text


def test_what_nobody_expected_is_one_line_of_a_check(
    tmp_path: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> str:
        raise RecursionError("maximum recursion depth exceeded")

    monkeypatch.setattr("hfedmoe.models.digest.base_digest", broken)
    offer = Offer(versions(), RUN, CONFIG.format(model="tiny", more=""), TERMS.to_json(), "", "")
    model, *_ = [one for one in check_offer(offer, worker._allowed) if not one.fits]
    assert model.text == "the model cannot be checked (RecursionError: maximum recursion depth exceeded)"
    assert model.code == FAULT


def test_a_device_holds_no_more_experts_than_its_owner_allows(tmp_path: Path) -> None:
    own = rows_file(tmp_path / "own.csv", "earn", "acq", rows=6)
    policy = Policy(max_experts=10, max_steps=4, min_batch=2, max_seconds=60.0, measure=False)
    worker = Worker(Allowed(own, 16, str(save_tiny(tmp_path / "model")), policy=policy), 2, DeviceFolder(tmp_path))
    more = "[train]\nsteps = 4\nbatch_size = 2"
    assert facts_of(describe(worker, more=more))["budget"] == 10
    plan = ask(worker, PLAN, plan_request(1), CONFIG.format(model="theirs/model", more=more))
    held = unpack_bits(facts_of(plan)["resident"], [8] * 4)
    assert sum(int(keep.sum()) for keep in held) <= 10


def test_a_round_that_is_asked_for_again_and_again_does_not_pass_the_owners_limits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own, base = rows_file(tmp_path / "own.csv", "earn", "acq", rows=60), str(save_tiny(tmp_path / "model"))
    more = "[train]\nsteps = 2\nbatch_size = 2\n[method]\nbootstrap_batches = 100_000"
    written, keep = CONFIG.format(model=base, more=more), [torch.arange(8) < 3 for _ in range(4)]
    config = config_from_text(written, "the test")
    loaded = load(config.model, config.seed)
    start = pack(global_tensors(wrap(loaded.model, config, loaded.store)), keep)
    batches: list[int] = []
    honest = scoring.remember_scores
    monkeypatch.setattr(scoring, "remember_scores", lambda *given: (batches.append(1), honest(*given)))
    worker = Worker(Allowed(own, 16, base, policy=Policy(max_steps=2)), 2, DeviceFolder(tmp_path))

    def planned(round: int = 1) -> bytes:
        return facts_of(ask(worker, PLAN, plan_request(round), written))["resident"]  # type: ignore[return-value]

    def trained(round: int) -> Message:
        return ask(worker, TRAIN, train_request(round, keep, start), written)

    describe(worker, more=more)
    told = []
    for again in range(3):  # a server that goes on from its checkpoint: the same answer
        held = planned()
        assert len(batches) == 2 * (again + 1)  # not 25 in every first pass
        told.append((held, facts_of(trained(1))["step_losses"]))
    assert told[0] == told[1] == told[2]
    capsys.readouterr()
    assert facts_of(trained(1))["code"] == "policy_round"
    assert "answered" not in capsys.readouterr().out
    assert "round 1 again, which has had 6 steps; max-steps of this device is 2" in caplog.text
    assert "Traceback" not in caplog.text  # its owner's limit is no fault
    planned()  # with random experts now
    refused = trained(1)
    with pytest.raises(checks.TroubleError, match="asked for the same round more often than its owner's limits"):
        checks.trouble(refused)
    assert len(batches) == 3 * 2
    assert "status" not in facts_of(trained(2))


def test_a_run_has_one_task_and_servers_may_ask_about_a_few_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own, base, asked = rows_file(tmp_path / "own.csv", "earn", "acq", rows=6), str(save_tiny(tmp_path / "model")), 0
    allowed = Allowed(own, 16, base, policy=Policy(columns=("text", "label")), asked=tmp_path / "asked.json")
    worker = Worker(allowed, 2, DeviceFolder(tmp_path))

    def code(*labels: str, run: str = RUN, more: str = "") -> object:
        """The code of the answer to a description; 2 for its number if there is none."""
        terms = replace(TERMS, labels=labels).to_json()
        config = CONFIG.format(model=base, more="").replace("[data]", f"[data]\n{more}")
        facts = facts_of(ask(worker, DESCRIBE, describe_request(terms), config, run=run))
        return facts.get("code", facts.get("client"))

    assert code("acq") == "own_data"
    assert code("acq", "crude", "earn") == 2
    assert code("acq", "earn") == "other_task"  # would say whether there is crude
    assert code("acq", "crude", "earn", more="max_tokens = 8") == "other_task"
    assert code("acq", "crude", "earn", more='label = "name"') == "policy_task"
    # Nor in a message of another kind, or after going back to before the first round.
    config = CONFIG.format(model=base, more="")
    assert "resident" in facts_of(ask(worker, PLAN, plan_request(1), config))
    other = config.replace("[data]", "[data]\nmax_tokens = 8")
    assert facts_of(ask(worker, PLAN, plan_request(1), other))["code"] == "other_task"
    assert code("acq", "earn") == "other_task"
    assert code("acq", "crude", "earn") == 2
    # Another run may have another task, until there were too many.
    for number in range(MOST):
        asked += code("acq", "earn", f"ship {number}", run=f"{number:032x}") == 2
    assert asked == MOST - 4
    assert code("acq", "earn", run="f" * 32) == 2  # it was asked about that before
    refused = code("earn", run="e" * 32)
    assert refused == "many_tasks"
    assert f"delete {tmp_path / 'asked.json'} and start it again" in caplog.text
    offer = Offer(versions(), RUN, config, replace(TERMS, labels=("crude",)).to_json(), "", "")
    assert "many_tasks" in [one.code for one in check_offer(offer, allowed)]


def test_a_message_without_content_is_refused_and_does_not_end_the_worker(worker: Worker) -> None:
    for kind in (DESCRIBE, PLAN, TRAIN):
        reply = ask(worker, kind, RecordDict(), CONFIG.format(model="theirs/model", more=""))
        assert facts_of(reply)["code"] == "request"


def test_models_come_from_the_owners_folders_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = rows_file(tmp_path / "own.csv", "earn", "acq", rows=6)
    save_tiny(tmp_path / "models" / "base")
    elsewhere = save_tiny(tmp_path / "elsewhere")
    policy = Policy(models=(str(tmp_path / "none"), str(tmp_path / "models")))
    worker = Worker(Allowed(own, 16, policy=policy), 2, DeviceFolder(tmp_path))
    assert facts_of(describe(worker, model="/srv/of/the/server/base"))["client"] == 2
    assert facts_of(describe(worker, model="tiny"))["client"] == 2
    for name in (str(elsewhere), "hub/other", "/srv/..", "..", f"{tmp_path}/models/../elsewhere"):
        with pytest.raises(checks.TroubleError, match="does not allow the run's model"):
            checks.trouble(describe(worker, model=name))
    assert f"the run's model is {elsewhere}, which is not in the folders of this device's models" in caplog.text


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


def test_a_device_whose_disk_is_full_says_so_and_goes_on_when_there_is_room(
    tmp_path: Path, tiny_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = rows_file(tmp_path / "own.csv", "earn", "acq", rows=6)
    worker = Worker(Allowed(own, 16, str(save_tiny(tmp_path / "model"))), 2, DeviceFolder(tiny_disk))
    describe(worker)
    (tiny_disk / "other").write_bytes(bytes(shutil.disk_usage(tiny_disk).free))
    plan = ask(worker, PLAN, plan_request(1), CONFIG.format(model="theirs/model", more=""))
    with pytest.raises(checks.TroubleError, match="cannot write what it remembers, perhaps because its disk is full"):
        checks.trouble(plan)
    assert set(facts_of(plan)) == {"status", "code", "count"}
    assert "No space left on device" in caplog.text
    (tiny_disk / "other").unlink()
    plan = ask(worker, PLAN, plan_request(1), CONFIG.format(model="theirs/model", more=""))
    assert "resident" in facts_of(plan)


def test_without_a_model_of_its_own_a_device_opens_packaged_ones_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = rows_file(tmp_path / "own.csv", "earn", "acq", rows=6)
    worker = Worker(Allowed(own, "50%"), 2, DeviceFolder(tmp_path))
    theirs = save_tiny(tmp_path / "model")
    with caplog.at_level(logging.ERROR):
        reply = describe(worker, model=str(theirs))
    with pytest.raises(checks.TroubleError):
        checks.trouble(reply)
    assert "say with --model where this device has it" in caplog.text
    assert facts_of(describe(worker, model="tiny"))["client"] == 2


def test_what_a_device_trains_for_itself_is_in_its_folder_and_in_no_reply(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    own, base = rows_file(tmp_path / "own.csv", "earn", "acq", rows=60), str(save_tiny(tmp_path / "model"))
    written = CONFIG.format(
        model=base, more="[train]\nsteps = 2\nlr = 1e-2\n[evaluation]\ntune_steps = 3\npersonal_every = 1"
    )
    config = config_from_text(written, "the test")
    loaded = load(config.model, config.seed)
    tensors = global_tensors(wrap(loaded.model, config, loaded.store))
    keep = [torch.arange(8) < 3 for _ in range(4)]
    final = train_request(1, keep, pack(tensors, keep))

    def worker(policy: Policy = ANYTHING) -> Worker:  # every time another process
        return Worker(Allowed(own, 16, base, policy=policy), 2, DeviceFolder(tmp_path))

    ask(worker(), DESCRIBE, describe_request(TERMS.to_json()), written)
    assert facts_of(ask(worker(), TUNE, final, written))["code"] == "request"  # before it has trained
    checks.trouble(ask(worker(), TRAIN, final, written))
    file = DeviceFolder(tmp_path).tuned / f"{RUN}.safetensors"
    refused = ask(worker(Policy(tune=False)), TUNE, final, written)
    with pytest.raises(checks.TroubleError, match=r"does not go on training .* \(evaluation.tune_steps\)"):
        checks.trouble(refused)
    assert not file.exists()
    reply = ask(worker(), TUNE, final, written)
    told = checks.own_result(reply, config.evaluation.own_rows, choices=True)
    assert (told.trained_rows, told.own_rows) == (50, 10)
    assert told.loss_after < told.loss_before
    assert TENSORS not in reply.content.array_records
    assert all(isinstance(value, int | float) for value in facts_of(reply).values())
    assert f"its experts are in {file}, and nowhere else" in capsys.readouterr().out
    tuned = Tuned.read(file, [8] * 4)
    assert (tuned.client, tuned.steps) == (2, 3)
    assert [known.tolist() for known in tuned.memory.experts] == [part.tolist() for part in keep]
    moved = [name for name, part in tuned.memory.tensors.items() if not torch.equal(part, pack(tensors, keep)[name])]
    assert any(name.startswith("experts.") for name in moved)
    assert file.stat().st_size > (tmp_path / "memory" / RUN / "now").stat().st_size  # it is not in its memory as well
    again = ask(worker(), TUNE, final, written)  # of a server that was killed before it had the answer
    assert dict(facts_of(again)) == dict(facts_of(reply))
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    other = train_request(1, keep, pack(zeros, keep))
    assert facts_of(ask(worker(), TUNE, other, written))["code"] == "request"  # once
    measured = ask(worker(), MEASURE, final, written)
    assert facts_of(measured)["own_rows"] == 10
    own_score = ask(worker(), PERSONAL, final, written)
    assert sorted(facts_of(own_score)) == ["loss", "own_rows", "right"]
    assert facts_of(own_score)["own_rows"] == 10
    # Nor when the server goes back to before the first round.
    for kind, content in ((PLAN, plan_request(1)), (TRAIN, final)):
        assert "status" not in facts_of(ask(worker(), kind, content, written))
    for kind, first in ((MEASURE, measured), (TUNE, reply), (PERSONAL, own_score)):
        assert facts_of(ask(worker(), kind, other, written))["code"] == "request"
        assert dict(facts_of(ask(worker(), kind, final, written))) == dict(facts_of(first))
