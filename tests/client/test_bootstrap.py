"""Where a client's first scores come from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, Metadata, RecordDict

from hfedmoe.client.attempt import attempt
from hfedmoe.client.device import Device
from hfedmoe.client.history import ClientHistory
from hfedmoe.client.place import Place
from hfedmoe.events import Silent
from hfedmoe.method.selection import select
from hfedmoe.method.usage import FederationUsage
from hfedmoe.models.tiny import tiny_model, tiny_tokenizer
from hfedmoe.moe.payload import global_tensors, pack
from hfedmoe.prepare import prepare
from hfedmoe.runs.folder import RunFolder
from hfedmoe.server.keeper import Keeper
from hfedmoe.simulation import resume, run
from hfedmoe.wire.messages import InvalidReplyError, plan_request, record, usage_of
from hfedmoe.wire.trouble import Trouble
from tests.federation import Federation, tiny_config

Make = Callable[..., Federation]
QUICK = ("data.test_rows=6", "evaluation.watch_rows=1", "train.steps=1")
PRIOR = (*QUICK, "method.bootstrap=prior", "federation.clients_per_round=2", "federation.rounds=3", "seed=3")


def plan_of(device: Device, history: ClientHistory, round: int) -> list[torch.Tensor]:
    return device.place.plan(history, round, None, device.first_pass)


def message(content: RecordDict) -> Message:
    return Message(content, metadata=Metadata(1, "1", 1, 0, "", "", 0.0, 60.0, "query.plan"))  # type: ignore[call-overload]


def spy(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, Any, bool, Any]]:
    """Notes (round, client, usage received, whether it had observed anything, resident set) of every plan."""
    seen: list[tuple[int, int, Any, bool, Any]] = []
    honest = Place.plan

    def plan(place: Place, history: Any, round: int, usage: Any, first_pass: Any) -> Any:
        observed = history.observed
        resident = honest(place, history, round, usage, first_pass)
        seen.append((round, place.number, usage, observed, resident))
        return resident

    monkeypatch.setattr(Place, "plan", plan)
    return seen


def test_the_prior_is_the_mean_usage_over_rounds_and_clients_by_examples(
    federation: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = federation(*PRIOR, 'clients.budgets=["50%"]')
    seen = spy(monkeypatch)
    run.run()
    folder = RunFolder.open(tmp_path / "run")
    lines = folder.read_rounds()
    recorded = {(row["round"], row["client"]): row["usage"].ravel() for row in folder.read_expert_rows()}
    late = 0
    for round, client, usage, observed, resident in seen:
        if round == 1:
            assert usage is None
            expected = select(run.devices[client].place.draw(1), 16, at_least=2)  # as with bootstrap = "none"
            assert all(torch.equal(a, b) for a, b in zip(resident, expected, strict=True))
            continue
        if usage is None:
            assert observed  # planned with its update of the round before
            continue
        rows = [
            (recorded[line["round"], row["client"]], row["examples"])
            for line in lines[1:round]
            for row in line["clients"]
        ]
        assert len(rows) == 2 * (round - 1)
        by_hand = sum(u.astype(np.float64) * n for u, n in rows) / sum(n for _, n in rows)
        np.testing.assert_array_equal(torch.cat(usage).numpy(), by_hand.astype(np.float32))
        if not observed:
            late += 1
            expected = select(usage, 16, at_least=2)
            assert all(torch.equal(a, b) for a, b in zip(resident, expected, strict=True))
    assert late >= 1, "no client joined after the first round: choose another seed"


def test_only_prior_sends_usage(federation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = federation(*QUICK, "method.bootstrap=none")
    seen = spy(monkeypatch)
    run.run()
    assert {round for round, *_ in seen} == {1, 2}
    assert all(usage is None for _, _, usage, _, _ in seen)


class Stopped(Exception):
    pass


class StopAfter(Silent):
    def __init__(self, round: int) -> None:
        self.round = round

    def round_done(self, round: int, *_: object) -> None:
        if round == self.round:
            raise Stopped


def test_a_resumed_run_knows_the_usage_to_the_last_bit(tmp_path: Path) -> None:
    config = tiny_config(*PRIOR)
    run(config, tmp_path / "whole", Silent())
    with pytest.raises(Stopped):
        run(config, tmp_path / "stopped", StopAfter(1))
    resume(tmp_path / "stopped", Silent())
    one, other = (RunFolder.open(tmp_path / name) for name in ("whole", "stopped"))
    for name, tensor in one.load_checkpoint("last").tensors.items():
        assert torch.equal(tensor, other.load_checkpoint("last").tensors[name]), name
    first, second = Keeper(one).usage.value(), Keeper(other).usage.value()
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


def test_recalled_usage_equals_the_live_one_with_layers_of_different_sizes(tmp_path: Path) -> None:
    config = tiny_config("method.bootstrap=prior")
    live, numbers = FederationUsage(), [3, 2]
    with RunFolder.create(tmp_path / "run", config) as folder:
        for round in (1, 2):
            usage = torch.rand(2, 5, generator=torch.Generator().manual_seed(round))
            clients = [round - 1, round]
            with folder.expert_rows(round, numbers) as add:
                for client, row in zip(clients, usage, strict=True):
                    add(client, row, row, row > 0, row > 0)
            status = [{"client": c, "weight": 10 + c, "status": "ok"} for c in clients]
            folder.append_round({"round": round, "evaluation": {}, "clients": status})
            for client, row in zip(clients, usage, strict=True):
                live.add(row, 10 + client)
        recalled = Keeper(folder).usage.value()
    assert recalled is not None
    assert live.value() is not None
    assert torch.equal(recalled, live.value())  # type: ignore[arg-type]


def test_a_client_checks_the_usage_it_is_sent() -> None:
    assert usage_of(message(plan_request(1)), [2, 3]) is None
    good = torch.arange(5.0)
    assert [part.tolist() for part in usage_of(message(plan_request(2, good)), [2, 3]) or []] == [[0, 1], [2, 3, 4]]
    for bad in (torch.arange(4.0), torch.full((5,), float("nan")), torch.arange(5), torch.zeros(10_000)):
        with pytest.raises(InvalidReplyError):
            usage_of(message(plan_request(2, bad)), [2, 3])
    with pytest.raises(InvalidReplyError):
        usage_of(message(record({"round": 2}, {"other": good})), [2, 3])


def test_streaming_in_memory_equals_the_forward_pass() -> None:
    ends = []
    for bootstrap in ("forward", "stream"):
        one = Federation(None, tiny_config(*QUICK, "federation.rounds=1", f"method.bootstrap={bootstrap}"))
        one.run()
        ends.append(one.server.tensors)
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_a_budget_in_experts_takes_the_place_of_the_configured_one() -> None:
    one = Federation(None, tiny_config(*QUICK, 'clients.budgets=["50%"]'))
    one.devices[1].budget_experts = 10
    one.devices[2].budget_experts = 10_000
    assert [device.place.budget for device in one.devices] == [16, 10, 32, 16]


def test_a_device_that_streams_sees_what_the_whole_model_shows_and_holds_only_its_budget(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    for part in (tiny_model(len(tokenizer), 0), tokenizer):
        part.save_pretrained(tmp_path)
    devices = []
    for bootstrap, carve in (("forward", False), ("stream", True)):
        config = tiny_config(*QUICK, f"model.name={tmp_path}", f"method.bootstrap={bootstrap}")
        ready = prepare(config, Silent(), carve=carve)
        devices.append(Device(1, "device", ready.model, ready.encoder, ready.task.train[:40], config, ready.initial))
    histories = [ClientHistory.new(device.model.num_experts) for device in devices]
    whole, streamed = (plan_of(device, history, 1) for device, history in zip(devices, histories, strict=True))
    for name, tensor in histories[0].to_tensors().items():
        assert torch.equal(tensor, histories[1].to_tensors()[name]), name
    assert all(torch.equal(a, b) for a, b in zip(whole, streamed, strict=True))
    store = devices[1].model.store
    assert store is not None
    assert len(store) <= 16
    # It trains as the whole model would, runs out of memory, and goes on with fewer experts.
    tensors = global_tensors(devices[0].model)
    losses = [
        device.train(history, whole, pack(tensors, whole), 1).work.last_loss
        for device, history in zip(devices, histories, strict=True)
    ]
    assert losses[0] == losses[1]
    devices[1].on_step = lambda client, step, loss: torch.empty(10**15)
    assert isinstance(attempt(lambda: devices[1].train(histories[1], whole, pack(tensors, whole), 2)), Trouble)
    devices[1].on_step = None
    histories[1].limit = 14
    fewer = plan_of(devices[1], histories[1], 3)
    assert devices[1].train(histories[1], fewer, pack(tensors, fewer), 3).work.steps == 1
    assert len(store) == 14
