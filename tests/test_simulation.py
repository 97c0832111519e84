"""Whole rounds: what clients hold, train and send; and clients that fail."""

import math
import statistics
import struct
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, Metadata, RecordDict

from hfedmoe.client import app as at_client
from hfedmoe.client.device import Device
from hfedmoe.config.federation import FederationConfig
from hfedmoe.errors import UserError
from hfedmoe.events import ClientRound, Silent
from hfedmoe.moe.payload import expert_shapes
from hfedmoe.runs.folder import RunFolder
from hfedmoe.server.keeper import Keeper
from hfedmoe.server.members import Member, weigh
from hfedmoe.wire import checks, inprocess
from hfedmoe.wire.exchange import clean
from hfedmoe.wire.messages import Description, InvalidReplyError, Update, tensors_of
from tests.federation import Federation, tiny_config

Make = Callable[..., Federation]


class Notes(Silent):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.done: list[tuple[int, int, ClientRound]] = []
        self.warnings: list[str] = []

    def client_done(self, round: int, client: int, done: ClientRound) -> None:
        self.done.append((round, client, done))

    def warning(self, text: str) -> None:
        self.warnings.append(text)


def meddle(federation: Federation, client: int, change: Callable[[Device, Any, Update], Any]) -> None:
    """Let something happen to a client's update before it is sent."""
    device = federation.devices[client]
    honest = device.train

    def train(history: Any, resident: Any, tensors: Any, round: int) -> Update:
        update = honest(history, resident, tensors, round)
        result: Update = change(device, resident, update) or update
        return result

    device.train = train  # type: ignore[method-assign]


@pytest.mark.parametrize("budgets", ['["4GiB"]', '["jetson-orin-nano-8gb", "25%"]', '["auto"]', '["1MiB"]'])
def test_with_residency_all_budgets_of_every_kind_mean_nothing(federation: Make, tmp_path: Path, budgets: str) -> None:
    federation("method.residency=all", f"clients.budgets={budgets}", "federation.rounds=1").run()
    rows = RunFolder.open(tmp_path / "run").read_rounds()[1]["clients"]
    assert [(row["status"], row["resident"]) for row in rows] == [("ok", 32)] * 4


def test_clients_hold_and_send_in_proportion_to_their_budget(federation: Make, tmp_path: Path) -> None:
    notes = Notes()
    run = federation(watcher=notes)
    run.run()
    lines = RunFolder.open(tmp_path / "run").read_rounds()
    assert [line["round"] for line in lines] == [0, 1, 2]
    shapes = expert_shapes(run.prepared.model)
    row_bytes = sum(
        torch.Size(shape[1:]).numel() * 4 for name, shape in shapes.items() if name.startswith("experts.0.")
    )
    gates = sum(router.numel() * 4 for router in run.prepared.model.routers.values())
    for row, budget in zip(lines[1]["clients"], (8, 16, 32, 16), strict=True):
        assert row["resident"] == budget
        assert row["trained"] <= budget
        assert not row["peak_is_measured"]
        assert 0 < row["routing_consistency"] <= 1
        listed_down = gates + row["resident"] * row_bytes + 4
        listed_up = gates + row["trained"] * row_bytes + 3 * 32 * 4 + 2 * 4
        assert listed_down <= row["bytes_down"] <= 1.02 * listed_down + 4096  # names and shapes: fixed for a model
        assert listed_up <= row["bytes_up"] <= 1.02 * listed_up + 4096
    predicted = [row["peak_bytes"] for row in lines[1]["clients"]]
    assert predicted[0] < predicted[1] == predicted[3] < predicted[2]
    assert not notes.warnings


def test_experts_that_nobody_trained_keep_their_bits_and_the_others_move(federation: Make) -> None:
    run = federation('clients.budgets=["25%"]', "federation.rounds=1", "train.steps=1", "train.batch_size=1")
    before = {name: tensor.clone() for name, tensor in run.server.tensors.items()}
    trained = [torch.zeros(number, dtype=torch.bool) for number in run.server.num_experts]

    def note(device: Device, resident: Any, update: Update) -> None:
        for seen, flags in zip(trained, update.trained, strict=True):
            seen |= flags

    for client in range(4):
        meddle(run, client, note)
    run.run()
    assert 0 < sum(int(flags.sum()) for flags in trained) < 32
    for name, tensor in run.server.tensors.items():
        if name.startswith("experts."):
            moved = (tensor != before[name]).flatten(1).any(1)
            allowed = trained[int(name.split(".")[1])]
            assert not (moved & ~allowed).any(), f"{name}: an expert that nobody trained has changed"
            if name.endswith("_b"):
                assert moved[allowed].any()


def _raise(device: Device, resident: Any, update: Update) -> None:
    raise OSError("disk gone")


class Clock:
    """The clock of the carrier, which a client that takes long moves on: nobody has to be quick on a busy machine."""

    ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


CLOCK = Clock()


def _take_too_long(device: Device, request: Any, update: Update) -> None:
    CLOCK.ahead += 601.0


FAULTS: dict[str, tuple[Callable[[Device, Any, Update], Any], str, str]] = {
    "raises": (_raise, "failed", "disk gone"),
    "late": (_take_too_long, "late", "no reply within 600 s"),
    "nan": (
        lambda d, r, u: replace(u, tensors={n: t * float("nan") for n, t in u.tensors.items()}),
        "invalid",
        "is not finite",
    ),
    "misshapen": (
        lambda d, r, u: replace(u, tensors={n: t[..., :-1] for n, t in u.tensors.items()}),
        "invalid",
        "has shape",
    ),
    "missing": (
        lambda d, r, u: replace(u, tensors=dict(list(u.tensors.items())[1:])),
        "invalid",
        "missing or unexpected",
    ),
    "dtype": (
        lambda d, r, u: replace(u, tensors={n: t.double() for n, t in u.tensors.items()}),
        "invalid",
        "expected torch.float32",
    ),
    "stolen": (
        lambda d, r, u: replace(u, trained=[torch.ones_like(flags) for flags in u.trained]),
        "invalid",
        "that it was not given",
    ),
    "boastful": (lambda d, r, u: replace(u, work=replace(u.work, examples=10**6)), "invalid", "examples"),
    "usage": (lambda d, r, u: replace(u, usage=[x - 1 for x in u.usage]), "invalid", "usage is outside"),
    "huge": (
        lambda d, r, u: replace(u, tensors={n: t + 1e30 for n, t in u.tensors.items()}),
        "invalid",
        "has values over",
    ),
    "loss": (lambda d, r, u: replace(u, work=replace(u.work, last_loss=math.inf)), "invalid", "last_loss"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_client_is_left_out_counted_and_named(
    federation: Make, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inprocess, "time", CLOCK)
    change, status, reason = FAULTS[fault]
    notes = Notes()
    run = federation("federation.rounds=1", "federation.timeout_s=600", watcher=notes)
    meddle(run, 0, change)
    run.run()
    (line,) = RunFolder.open(tmp_path / "run").read_rounds()[1:]
    assert line["short"] is True
    assert line["clients"][0]["status"] == status
    assert reason in line["clients"][0]["reason"]
    assert [row["status"] for row in line["clients"][1:]] == ["ok"] * 3
    assert any("client 0 is left out" in text and reason in text for text in notes.warnings)
    assert all(tensor.isfinite().all() for tensor in run.server.tensors.values())


def test_too_few_valid_updates_stop_the_run_and_leave_its_checkpoint(federation: Make, tmp_path: Path) -> None:
    run = federation("federation.min_clients=3", "federation.rounds=3")
    calls = {0: 0, 1: 0}

    def second_time(device: Device, resident: Any, update: Update) -> None:
        calls[device.number] += 1
        if calls[device.number] == 2:
            raise OSError("gone")

    for client in (0, 1):
        meddle(run, client, second_time)
    with pytest.raises(UserError, match=r"round 2: 2 valid updates.*min_clients = 3.*client 0.*gone.*hfedmoe resume"):
        run.run()
    folder = RunFolder.open(tmp_path / "run")
    assert folder.load_checkpoint("last").round == 1
    assert folder.read_rounds()[-1]["failed"] is True


def test_lora_modes_and_gate_rules_run_and_learn(federation: Make) -> None:
    for number, overrides in enumerate(
        (
            ["train.lora=freeze_a"],
            ["train.lora=exact", "method.gate=rows"],
            ["method.gate=fedavg", "method.expert_weight=tokens", "method.score=taylor"],
            ["method.score=activation", "clients.activation=2", "clients.off_budget=skip"],
            ["method.score=random", 'clients.activation="50%"', "method.level=token"],
            ["train.experts=full", "method.expert_weight=importance", "method.residency=all"],
            ["train.attention=true", "train.experts=frozen", "train.gradient_checkpointing=true"],
            ["train.attention=true", "train.experts=frozen", "train.lora=freeze_a"],
            ["train.attention=true", "train.experts=frozen", "train.lora=exact"],
        )
    ):
        config = tiny_config("federation.rounds=1", f"seed={number}", *overrides)
        run = Federation(None, config)
        before = {name: tensor.clone() for name, tensor in run.server.tensors.items()}
        run.run()
        kinds = {name.split(".")[0] for name, tensor in run.server.tensors.items() if (tensor != before[name]).any()}
        expected = {"router", "shared"} if "train.attention=true" in overrides else {"router", "experts"}
        assert kinds == expected, f"{overrides}: {kinds} changed"
        if "train.lora=freeze_a" in overrides:
            a = [name for name in run.server.tensors if name.endswith("_a") or ".lora_A." in name]
            assert not a, "A travels although it is frozen"


def test_off_budget_experts_are_not_trained() -> None:
    run = Federation(
        None, tiny_config("federation.rounds=1", "clients.activation=1", "method.residency=all", "train.steps=1")
    )
    seen = []
    for client in range(4):
        meddle(run, client, lambda d, r, u: seen.append([int(flags.sum()) for flags in u.trained]))
    run.run()
    assert seen == [[1, 1, 1, 1]] * 4


def test_sampling_is_seeded_and_takes_as_many_as_asked(federation: Make, tmp_path: Path) -> None:
    run = federation("federation.clients_per_round=2", "federation.rounds=3")
    run.run()
    sampled = [
        [row["client"] for row in line["clients"]] for line in RunFolder.open(tmp_path / "run").read_rounds()[1:]
    ]
    assert all(len(clients) == 2 for clients in sampled)
    assert len({tuple(clients) for clients in sampled}) > 1


def test_an_update_is_forgotten_before_the_next_client_works(federation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    updates: list[weakref.ref[Update]] = []
    alive: list[int] = []

    class Count(Silent):
        def client_started(self, round: int, client: int, steps: int) -> None:
            alive.append(sum(update() is not None for update in updates))

    def watched(function: Callable[..., Any], update_of: Callable[[Any, Any], Update]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            result = function(*args)
            updates.append(weakref.ref(update_of(args, result)))
            return result

        return call

    monkeypatch.setattr(at_client, "train_reply", watched(at_client.train_reply, lambda args, _: args[0]))
    monkeypatch.setattr(checks, "update", watched(checks.update, lambda _, result: result))
    federation(watcher=Count()).run()
    assert len(updates) == 2 * 4 * 2
    assert alive == [0] * 8


def test_what_is_noted_of_a_round_goes_with_it() -> None:
    with Keeper(None).recording(1, [2], tau=0.1) as log:
        log.left_out(3, "late", "no reply")
        assert [done.client for done in log.clients()] == [3]
    with pytest.raises(ValueError, match="closed file"):
        list(log.clients())


def test_reasons_are_safe_to_print() -> None:
    assert clean("\n \n") == "no reason given"
    assert clean("first\x1b[31m red\nsecond") == "first[31m red"
    assert len(clean("x" * 10_000)) == 300


def test_a_crafted_blob_is_an_invalid_reply() -> None:
    header = b'{"a":{"dtype":"F32","shape":[0,18446744073709551615],"data_offsets":[0,0]}}'
    for blob in (b"", b"not safetensors", struct.pack("<Q", len(header)) + header):
        content = RecordDict(
            {"tensors": ArrayRecord({"safetensors": Array("uint8", (len(blob),), "safetensors", blob)})}
        )
        metadata = Metadata(1, "1", 1, 0, "", "", 0.0, 60.0, "train")
        with pytest.raises(InvalidReplyError):
            tensors_of(Message(content, metadata=metadata))


def test_few_held_out_rows_leave_none_to_watch(federation: Make, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"word {number},{'ab'[number % 2]}\n" for number in range(40)))
    own = (f"data.source={rows}", "data.format=classification", "data.test_share=0.1", "partition.scheme=iid")
    run = federation(*own, "partition.min_rows=1", "evaluation.watch_rows=64", "federation.rounds=1")
    run.run()
    assert run.server.round == 1
    assert not run.server.watches
    assert [len(run.prepared.task.test), len(run.prepared.watch)] == [4, 0]


def test_the_traceback_of_a_client_that_failed_is_in_the_runs_log(tmp_path: Path) -> None:
    from hfedmoe import simulation

    config = tiny_config("federation.rounds=1", "train.steps=1", "data.test_rows=6")
    broken = replace_first_device(simulation.assemble)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation, "assemble", broken)
        simulation.run(config, tmp_path / "run", Silent())
    text = (tmp_path / "run" / "log.txt").read_text()
    assert "client 0 failed in train" in text
    assert "Traceback (most recent call last)" in text
    assert "ZeroDivisionError: a bug" in text


def replace_first_device(honest: Callable[..., Any]) -> Callable[..., Any]:
    """As `assemble`, with a first client whose training has a bug."""

    def assemble(*arguments: Any) -> Any:
        made = honest(*arguments)

        def train(*_: Any) -> Update:
            raise ZeroDivisionError("a bug")

        made.devices[0].train = train
        return made

    return assemble


def test_a_client_counts_at_most_so_many_times_the_median(federation: Make, tmp_path: Path) -> None:
    notes = Notes()
    run = federation("federation.rounds=1", "train.steps=1", "federation.max_weight=1.5", watcher=notes)
    device = run.devices[0]
    device.examples = device.examples * 400
    run.run()
    (line,) = RunFolder.open(tmp_path / "run").read_rounds()[1:]
    examples = [row["examples"] for row in line["clients"]]
    most = round(1.5 * statistics.median_low(examples))
    assert examples[0] == len(device.examples) > most
    assert [row["weight"] for row in line["clients"]] == [min(number, most) for number in examples]
    assert any("client 0 says that it has" in text and f"it counts as {most}" in text for text in notes.warnings)


@pytest.mark.parametrize(
    ("told", "counted"), [([10, 10**9], [10, 1000]), ([1, 2, 10**9, 10**9], [1, 2, 200, 200]), ([5], [5])]
)
def test_half_of_the_clients_cannot_raise_what_they_count(told: list[int], counted: list[int]) -> None:
    members = {
        number: Member(number, Description(number, f"client {number}", rows, 1, [1]), 0)
        for number, rows in enumerate(told)
    }
    weigh(members, FederationConfig(), Silent())
    assert [member.weight for member in members.values()] == counted


def test_what_a_run_needs_at_its_end_is_checked_before_its_first_round(tmp_path: Path) -> None:
    from hfedmoe import simulation

    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"oil {n},{('money-fx', 'money-supply')[n % 2]}\n" for n in range(40)))
    own = (f"data.source={rows}", "data.format=classification", "partition.scheme=iid", "partition.min_rows=1")
    with pytest.raises(UserError, match=r"evaluation.scoring=first_token: some choices begin with the same token"):
        simulation.run(tiny_config(*own, "evaluation.scoring=first_token"), tmp_path / "run", Silent())
    assert not (tmp_path / "run").exists()


def test_too_little_room_for_checkpoints_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hfedmoe import simulation
    from hfedmoe.files import disk

    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(UserError, match=r"checkpoints need .* MiB, but only 1 MiB are free"):
        simulation.run(tiny_config(), tmp_path / "run", Silent())
