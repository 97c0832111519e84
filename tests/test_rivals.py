"""Methods other than ours, through the same client, wire and server."""

import json
import re
import runpy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hfedmoe.cli import main
from hfedmoe.client.history import ClientHistory
from hfedmoe.errors import TrainingError
from hfedmoe.events import Silent
from hfedmoe.method.methods import METHODS
from hfedmoe.method.row import Residents, Settings, Wish
from hfedmoe.method.selection import select
from hfedmoe.moe.payload import MismatchError, public
from hfedmoe.runs.folder import RunFolder
from hfedmoe.simulation import resume, run
from tests.federation import Federation, StopAt, Stopped, tiny_config

Make = Callable[..., Federation]
QUICK = ("data.test_rows=6", "evaluation.watch_rows=1", "federation.rounds=1")
BATCH_OF_ONE = ("train.steps=1", "train.batch_size=1")


def test_fedavg_leaves_out_who_cannot_hold_the_model_and_averages_all_that_was_sent(
    federation: Make, tmp_path: Path
) -> None:
    run = federation(*QUICK, *BATCH_OF_ONE, "method.name=fedavg", 'clients.budgets=["100%", "50%"]')
    before = dict(run.server.tensors)
    sent: dict[int, dict[str, Tensor]] = {}
    for device in (run.devices[0], run.devices[2]):
        honest = device.train

        def train(history, resident, tensors, round, honest=honest, device=device):  # type: ignore[no-untyped-def]
            update = honest(history, resident, tensors, round)
            sent[device.number] = update.tensors
            assert not all(bool(flags.all()) for flags in update.trained)  # or there would be no stale copies
            return update

        device.train = train  # type: ignore[method-assign]
    run.run()
    (line,) = RunFolder.open(tmp_path / "run").read_rounds()[1:]
    assert [row["status"] for row in line["clients"]] == ["ok", "too small"] * 2
    assert "room for 16 of the 32 experts" in line["clients"][1]["reason"]
    assert {row["resident"] for row in line["clients"][::2]} == {32}
    weights = [len(run.devices[number].examples) for number in (0, 2)]
    for name, tensor in run.server.tensors.items():
        assert sent[0][name].shape == before[name].shape  # every row travels, trained or not
        mean = sum(w * sent[number][name] for w, number in zip(weights, (0, 2), strict=True)) / sum(weights)
        torch.testing.assert_close(tensor, mean, msg=name)


def test_a_term_in_the_local_loss_holds_clients_back(federation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FedProx: mu / 2 times the squared distance from where the round began."""

    def towards_the_start(now: Sequence[Tensor], start: Sequence[Tensor], settings: Settings) -> Tensor:
        distance: Tensor = sum(((w - w0) ** 2).sum() for w, w0 in zip(now, start, strict=True))  # type: ignore[assignment]
        return 5000.0 * distance

    monkeypatch.setitem(METHODS, "prox", replace(METHODS["hfedmoe"], local_term=towards_the_start))
    moved, trained = {}, {}
    for name in ("hfedmoe", "prox"):
        run = federation_of(federation, name)
        before = {key: tensor.clone() for key, tensor in run.server.tensors.items()}
        flags: list[Tensor] = []
        honest = run.devices[0].train

        def train(*arguments, honest=honest, flags=flags):  # type: ignore[no-untyped-def]
            update = honest(*arguments)
            flags.extend(update.trained)
            return update

        run.devices[0].train = train  # type: ignore[method-assign]
        run.run()
        moved[name] = sum(float((run.server.tensors[key] - start).norm() ** 2) for key, start in before.items()) ** 0.5
        trained[name] = torch.cat(flags)
    assert moved["prox"] < 0.8 * moved["hfedmoe"]
    # The term has a gradient for everything; only what the data reach counts as trained.
    assert 0 < int(trained["prox"].sum()) < 32


def federation_of(federation: Make, name: str) -> Federation:
    from hfedmoe.events import Silent
    from tests.federation import tiny_config

    settings = ("train.steps=4", "train.batch_size=1", "train.max_grad_norm=1e9", "clients.budgets=['100%']")
    return Federation(None, tiny_config(*QUICK, *settings, f"method.name={name}"), Silent())


def test_a_method_may_plan_on_the_server(federation: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each client gets its best experts among those that no client before it holds, while there are any."""
    seen: list[Wish] = []

    def cover(wishes: list[Wish], held: Tensor, settings: Settings) -> list[Residents]:
        seen.extend(wishes)
        taken = [torch.zeros(number) for number in wishes[0].num_experts]
        plans = []
        for wish in wishes:
            scores = [own - 10 * done for own, done in zip(wish.contribution, taken, strict=True)]
            plans.append(select(scores, wish.budget, at_least=max(wish.top_k)))
            taken = [done + keep for done, keep in zip(taken, plans[-1], strict=True)]
        return plans

    monkeypatch.setitem(METHODS, "cover", replace(METHODS["hfedmoe"], assign=cover))
    run = federation(*QUICK, "method.name=cover", 'clients.budgets=["25%"]')
    run.run()
    rows = RunFolder.open(tmp_path / "run").read_expert_rows()
    assert rows is not None
    assert [wish.budget for wish in seen] == [8] * 4
    assert [wish.examples for wish in seen] == [len(device.examples) for device in run.devices]
    held = torch.tensor(rows["resident"].reshape(4, -1).astype("int64"))
    assert held.sum(1).tolist() == [8] * 4
    assert held.sum(0).tolist() == [1] * 32  # four clients of eight experts cover all 32 once


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_and_is_resumed_with_the_same_bits(name: str, tmp_path: Path) -> None:
    settings = (
        "data.test_rows=6",
        "evaluation.watch_rows=2",
        "federation.rounds=3",
        "keep_checkpoints=4",
        "evaluation.own_share=0",  # every row trains
        "train.batch_size=2",
        f"method.name={name}",
        'clients.budgets=["100%","50%"]',
    )
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(tiny_config(*settings), whole, Silent())
    with pytest.raises(Stopped):
        run(tiny_config(*settings), stopped, StopAt(3))
    resume(stopped, Silent())
    one, other = (RunFolder.open(path).load_checkpoint("last").tensors for path in (whole, stopped))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    start = RunFolder.open(whole).load_checkpoint(1).tensors
    changed = {key.split(".")[0] for key, tensor in one.items() if not torch.equal(tensor, start[key])}
    trained = {"router"} if METHODS[name].frozen_experts else {"router", "experts"}
    assert changed == trained - METHODS[name].private
    (line,) = RunFolder.open(whole).read_rounds()[-1:]
    statuses = [row["status"] for row in line["clients"]]
    if name == "pooled":
        assert statuses == ["ok"]
        assert line["clients"][0]["steps"] == 4 * 2
        assert line["clients"][0]["examples"] == 160
    elif name in ("fedavg", "fedprox", "fc_moe", "fedalign_moe", "pfl_moe", "flex"):
        assert statuses == ["ok", "too small"] * 2
    else:
        assert statuses == ["ok"] * 4
        held = [row["resident"] for row in line["clients"]]
        assert held == [32] * 4 if METHODS[name].unlimited else held[1] <= 16


@pytest.mark.parametrize("name", ["local", "flex_moe", "flame", "pfl_moe", "flex"])
def test_what_a_client_keeps_never_travels(federation: Make, name: str) -> None:
    run = federation(*QUICK, f"method.name={name}", "federation.rounds=2", 'clients.budgets=["100%"]')
    private = METHODS[name].private
    there = {key.split(".")[0] for key in run.server.tensors}
    before = {key: tensor.clone() for key, tensor in run.server.tensors.items() if key.split(".")[0] in private}
    sent: list[set[str]] = []
    for device in run.devices:
        honest = device.train

        def train(history, resident, tensors, round, honest=honest):  # type: ignore[no-untyped-def]
            update = honest(history, resident, tensors, round)
            sent.append({key.split(".")[0] for key in [*update.tensors, *tensors]})
            assert history.private is not None
            assert {key.split(".")[0] for key in history.private.tensors} == private & there != set()
            return update

        device.train = train  # type: ignore[method-assign]
    run.run()
    assert len(sent) == 8
    assert all(not kinds & private for kinds in sent)
    assert all(torch.equal(run.server.tensors[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.private])
def test_a_server_that_sends_what_is_private_is_refused(federation: Make, name: str) -> None:
    run = federation(*QUICK, f"method.name={name}", 'clients.budgets=["100%"]')
    history = ClientHistory.new(run.server.num_experts)
    everything = [torch.ones(number, dtype=torch.bool) for number in run.server.num_experts]
    with pytest.raises(MismatchError, match="is the client's own: a server must not send it"):
        run.devices[0].train(history, everything, run.server.tensors, 1)


def test_a_client_that_fails_leaves_its_model_without_a_limit_on_experts_per_token(federation: Make) -> None:
    run = federation(*QUICK, "method.name=flame", 'clients.budgets=["25%"]')
    device, limits = run.devices[0], []

    def fail(client: int, step: int, loss: float) -> None:
        limits.extend(state.most_per_token for state in device.model.states)
        raise TrainingError("no more")

    device.on_step = fail
    everything = [torch.ones(number, dtype=torch.bool) for number in device.model.num_experts]
    received = public(run.server.tensors, METHODS["flame"].private)
    with pytest.raises(TrainingError, match="no more"):
        device.train(ClientHistory.new(device.model.num_experts), everything, received, 1)
    assert set(limits) == {1}  # or there would have been none to take away
    assert {state.most_per_token for state in device.model.states} == {None}


def test_a_client_goes_on_with_what_it_kept(federation: Make) -> None:
    """Of experts that it held before; others begin as they were at first."""
    run = federation(*QUICK, "method.name=local", "federation.rounds=2", 'clients.budgets=["50%"]')
    device = run.devices[0]
    seen: list[tuple[list[Tensor], dict[str, Tensor]]] = []
    honest = device._begin

    def begin(history, resident, received):  # type: ignore[no-untyped-def]
        started = honest(history, resident, received)
        seen.append((resident, {key: tensor.clone() for key, tensor in started.items()}))
        if history.private is not None:
            for key, tensor in started.items():
                if key.startswith("experts."):
                    layer = int(key.split(".")[1])
                    known, now = history.private.experts[layer], resident[layer]
                    mine = tensor[known[now]]
                    assert torch.equal(mine, history.private.tensors[key][now[known]])
                    new = device.initial[key][now & ~known]
                    assert torch.equal(tensor[~known[now]], new)
        return started

    device._begin = begin  # type: ignore[method-assign]
    run.run()
    assert len(seen) == 2
    assert any(not torch.equal(seen[1][1][key], tensor) for key, tensor in seen[0][1].items() if "router" in key)


def test_the_example_of_docs_is_a_method(federation: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert source.count("\n") <= 40
    module: dict[str, Any] = {}
    exec(compile(source, "docs/methods.md", "exec"), module)
    monkeypatch.setitem(METHODS, "cover", module["COVER"])
    federation(*QUICK, "method.name=cover", "method.options.cover=3", 'clients.budgets=["25%"]').run()
    held = RunFolder.open(tmp_path / "run").read_expert_rows()["resident"].reshape(4, -1)
    assert held.sum(1).tolist() == [8] * 4
    assert held.any(0).sum() == 32  # a heavy weight: four clients of eight experts cover all 32


def test_the_page_of_methods_is_up_to_date() -> None:
    tool = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "methods_docs.py"))
    assert tool["TARGET"].read_text(encoding="utf-8") == tool["page"](), "run tools/methods_docs.py"


def test_the_list_of_methods(capsys: pytest.CaptureFixture[str]) -> None:
    outputs: list[str] = []
    for arguments in (["methods"], ["methods", "--json"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert not ended.value.code
        outputs.append(capsys.readouterr().out)
    listed, facts = outputs[0], json.loads(outputs[1])
    assert list(facts) == list(METHODS)
    for name, row in METHODS.items():
        assert f"\n{name}  ({row.source}" in f"\n{listed}"
        assert facts[name]["options"].keys() == {option.name for option in row.options}
    assert max(map(len, listed.splitlines())) <= 120


def test_a_method_corrects_the_loss_for_label_frequencies_where_labels_can_be_told_apart() -> None:
    plus = (*QUICK, *BATCH_OF_ONE, "method.name=hfedmoe+")

    def trained(*overrides: str) -> dict[str, Tensor]:
        run = Federation(None, tiny_config(*plus, *overrides))
        run.run()
        return run.server.tensors

    def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
        return all(torch.equal(tensor, other[name]) for name, tensor in one.items())

    own, off = trained(), trained("method.options.label_correction=0")
    assert not same(own, off)
    assert same(own, trained("train.logit_adjustment=1.0", "method.options.label_correction=0"))
    half = "train.logit_adjustment=0.5"  # the setting replaces the method's own strength
    assert same(trained(half), trained(half, "method.options.label_correction=0"))
    # Two labels that begin with the same token: whole labels are trained, and nothing is corrected.
    alike = 'data.label_words={ acq = "crude oil", crude = "crude" }'
    assert same(trained(alike), trained(alike, "method.options.label_correction=0"))
