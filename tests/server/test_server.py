"""Who takes part, in which order, and what of the configuration reaches the work."""

from typing import Any

import pytest
import torch

from hfedmoe.client.history import ClientHistory
from hfedmoe.errors import UserError
from hfedmoe.server import attendance, server
from hfedmoe.server.fold import Fold
from hfedmoe.server.members import Member, sample
from tests.federation import Federation, tiny_config
from tests.test_simulation import Notes

QUICK = ("data.test_rows=6", "evaluation.watch_rows=1", "train.steps=1")


def joined(run: Federation) -> dict[int, Member]:
    here = run.server.attendance(run.grid)
    here.gather()
    return here.members


def test_a_number_too_high_and_one_given_twice_are_left_out() -> None:
    notes = Notes()
    run = Federation(None, tiny_config(*QUICK), notes)
    run.devices[1].number, run.devices[2].number = 0, 4
    members = joined(run)
    assert [(client, member.node) for client, member in members.items()] == [(0, 1), (3, 4)]
    assert any("second client says it is number 0" in text for text in notes.warnings)
    assert any("it is number 4 of 4" in text for text in notes.warnings)


def test_too_few_clients_at_the_start_stop_the_run() -> None:
    run = Federation(None, tiny_config(*QUICK, "federation.min_clients=4"))
    run.devices[1].number = 0
    with pytest.raises(UserError, match=r"3 of 4 clients connected .* raise federation.connect_timeout_s"):
        run.run()


def test_too_little_time_for_an_answer_is_not_blamed_on_connecting() -> None:
    run = Federation(None, tiny_config(*QUICK, "federation.timeout_s=1e-9"))
    with pytest.raises(UserError, match=r"0 of 4 clients connected .* within 1e-09 s.* raise federation.timeout_s"):
        run.run()


def test_an_average_that_is_not_finite_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run, honest = Federation(None, tiny_config(*QUICK)), Fold.result
    monkeypatch.setattr(Fold, "result", lambda self: {name: t / 0 for name, t in honest(self).items()})
    with pytest.raises(UserError, match="is not finite after averaging"):
        run.run()


@pytest.mark.parametrize(("lora", "exact"), [("exact", True), ("factors", False)])
def test_how_lora_is_averaged_reaches_the_fold(lora: str, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    def spy(*arguments: Any) -> Fold:
        seen.append(arguments[2:])
        return Fold(*arguments)

    monkeypatch.setattr(server, "Fold", spy)
    Federation(None, tiny_config(*QUICK, "federation.rounds=1", f"train.lora={lora}", "train.rank=3")).run()
    assert seen == [(exact, 3, None)]


def test_clients_are_drawn_by_seed_and_round_and_come_in_the_order_of_their_numbers() -> None:
    def drawn(seed: int) -> list[list[int]]:
        run = Federation(None, tiny_config(*QUICK, f"seed={seed}"))
        members = joined(run)
        config = run.server.config
        return [[member.about.client for member in sample(members, config, round, 3)] for round in range(1, 9)]

    found = drawn(0)
    assert all(clients == sorted(clients) for clients in found)
    assert len({tuple(clients) for clients in found}) > 1
    assert drawn(0) == found
    assert drawn(1) != found


def test_plans_come_in_the_order_of_numbers_whoever_answers_first(monkeypatch: pytest.MonkeyPatch) -> None:
    run, honest = Federation(None, tiny_config(*QUICK)), attendance.exchange
    here = run.server.attendance(run.grid)
    here.gather()
    monkeypatch.setattr(attendance, "exchange", lambda *arguments: reversed(list(honest(*arguments))))
    with run.server.keeper.recording(1, run.server.num_experts, 0.1) as log:
        planned = run.server._plan(here, list(here.members.values()), log)
    assert [member.about.client for member in planned] == [0, 1, 2, 3]


@pytest.mark.parametrize(("every", "expected"), [(0, [0, 3]), (2, [0, 2, 3])])
def test_all_held_out_rows_are_measured_every_so_many_rounds(every: int, expected: list[int]) -> None:
    run = Federation(None, tiny_config(*QUICK, "federation.rounds=3", f"evaluation.every={every}"))
    run.run()
    assert [score.round for score in run.server.keeper.scores] == expected


def test_residency_that_is_drawn_differs_by_client_and_round_also_where_scores_were_seen() -> None:
    run = Federation(None, tiny_config(*QUICK, 'clients.budgets=["50%"]', "method.score=random"))

    def plan(client: int, round: int) -> list[bool]:
        history = ClientHistory.new(run.server.num_experts)
        for seen in history.scores:
            seen.update(torch.arange(8.0))
        return torch.cat(run.devices[client].place.plan(history, round, None, pytest.fail)).tolist()

    assert plan(0, 1) == plan(0, 1)
    assert plan(0, 1) != plan(1, 1)
    assert plan(0, 1) != plan(0, 2)


def test_the_first_pass_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Federation(None, tiny_config(*QUICK, 'clients.budgets=["50%"]', "federation.rounds=2"))
    made: list[int] = []
    honest = type(run.devices[0]).first_pass

    def spy(device: Any, history: ClientHistory) -> None:
        made.append(device.number)
        honest(device, history)

    monkeypatch.setattr(type(run.devices[0]), "first_pass", spy)
    run.run()
    assert made == [0, 1, 2, 3]


def test_the_learning_rate_falls_evenly_and_reaches_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("federation.rounds=3", "train.lr_final_share=0.2", "train.lr=0.01", "train.weight_decay=0.3")
    run = Federation(None, tiny_config(*QUICK, *settings))
    assert [run.devices[0].lr_factor(round) for round in (1, 2, 3)] == pytest.approx([1.0, 0.6, 0.2])
    rates: list[tuple[float, float]] = []
    honest = torch.optim.AdamW

    def spy(parameters: Any, **settings: Any) -> torch.optim.AdamW:
        rates.append((settings["lr"], settings["weight_decay"]))
        return honest(parameters, **settings)

    monkeypatch.setattr(torch.optim, "AdamW", spy)
    run.run()
    assert [rate for rate, _ in rates[::4]] == pytest.approx([0.01, 0.006, 0.002])
    assert {decay for _, decay in rates} == {0.3}
