"""FedMoE's second stage, on cases worked out by hand."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hfedmoe.config import MethodConfig
from hfedmoe.method.rivals.recommend import assign, stalls
from hfedmoe.method.row import Past, Wish
from hfedmoe.runs.folder import RunFolder
from hfedmoe.server.keeper import Keeper
from tests.federation import Federation

SCORES = [[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]
NOTHING = torch.zeros(8)


def settings(**options: float) -> MethodConfig:
    return MethodConfig(name="fedmoe_full", options={"patience": 2.0, "gain": 0.1} | options)


def held(*layers: list[int]) -> list[Tensor]:
    return [torch.tensor(layer).bool() for layer in layers]


FEW, MANY = held([1, 0, 0, 0], [0, 0, 0, 1]), held([1, 1, 1, 0], [0, 1, 1, 1])


def wish(past: list[Past], budget: int = 8, scores: list[list[float]] = SCORES) -> Wish:
    return Wish([4, 4], [1, 1], budget, 10, [torch.tensor(layer) for layer in scores], past)


def rounds(what: list[Tensor], *losses: float) -> list[Past]:
    return [Past(loss, what) for loss in losses]


def planned(*wishes: Wish, **options: float) -> list[list[list[int]]]:
    return [[layer.int().tolist() for layer in plan] for plan in assign(list(wishes), NOTHING, settings(**options))]


def test_at_first_it_is_the_first_stage_and_then_stays() -> None:
    assert planned(wish([], 2)) == [[[1, 0, 0, 0], [0, 0, 0, 1]]]
    assert planned(wish([])) == [[[1] * 4] * 2]
    other = [[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]]  # what is activated changes, what is held does not
    assert planned(wish(rounds(FEW, 2.0, 1.0), 2, other)) == [[[1, 0, 0, 0], [0, 0, 0, 1]]]


def test_a_stall_is_a_loss_that_does_not_fall_with_the_same_experts() -> None:
    assert stalls(rounds(FEW, 1.0, 0.95, 1.1), settings())
    assert not stalls(rounds(FEW, 1.0, 0.95, 0.85), settings())  # a gain of more than a tenth
    assert not stalls(rounds(FEW, 1.0, 1.0), settings())  # too early to say
    assert not stalls([*rounds(MANY, 1.0), *rounds(FEW, 1.0, 1.0)], settings())
    assert stalls([*rounds(MANY, 9.0), *rounds(FEW, 1.0, 1.0, 1.0)], settings(gain=0.0))


def test_a_stalled_client_gets_the_number_of_similar_ones() -> None:
    """Itself 2 experts, the others 6 and 6: four more, the most activated that it lacks: 0.3, 0.3, 0.2, 0.2."""
    stalled, others = wish(rounds(FEW, 1.0, 1.0, 1.0)), [wish(rounds(MANY, 9.0))] * 2
    assert planned(stalled, *others)[0] == [[1, 1, 1, 0], [0, 1, 1, 1]]
    assert planned(wish(rounds(FEW, 1.0, 1.0, 1.0), 3), *others)[0] == [[1, 1, 0, 0], [0, 0, 0, 1]]  # its room
    many = wish(rounds(MANY, 1.0, 1.0, 1.0))
    assert planned(many, wish(rounds(FEW, 9.0)))[0] == [[1, 0, 0, 0], [0, 0, 0, 1]]  # dropped: the least activated
    apart = [[0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]]
    assert planned(stalled, wish(rounds(MANY, 9.0), 8, apart))[0] == [[1, 0, 0, 0], [0, 0, 0, 1]]  # nobody is alike
    assert planned(wish(rounds(FEW, 3.0, 2.0, 1.0)), *others)[0] == [[1, 0, 0, 0], [0, 0, 0, 1]]  # it learns


def test_without_a_gain_it_gets_back_what_it_had_and_is_not_told_the_same_again() -> None:
    before, other = rounds(FEW, 1.0, 1.0, 1.0), wish(rounds(MANY, 9.0))
    in_vain, gained = [*before, *rounds(MANY, 0.95)], [*before, *rounds(MANY, 0.85)]
    few, many = [[1, 0, 0, 0], [0, 0, 0, 1]], [[1, 1, 1, 0], [0, 1, 1, 1]]
    assert planned(wish(in_vain), other)[0] == few
    assert planned(wish(gained), other)[0] == many
    back = [*in_vain, *rounds(FEW, 1.2)]  # worse than what was tried: that was no trial, it stays
    assert stalls(back, settings())
    assert planned(wish(back), other)[0] == few


def test_a_federation_tries_takes_back_and_remembers(federation: Callable[..., Federation], tmp_path: Path) -> None:
    """With a gain of 1 every client stalls, and no trial is a gain. Clients hold 16, 32, 16 and 32 experts.

    The others of client 1 hold 64 / 3 = 21 on average: in round 3 it tries that. Those of client 0 hold more, for which
    it has no room.
    """
    options = "method.options={patience=1,gain=1,alike=-1}"
    run = federation(
        "data.test_rows=6",
        "evaluation.watch_rows=1",
        "federation.rounds=4",
        "method.name=fedmoe_full",
        options,
        'clients.budgets=["50%","100%"]',
    )
    run.run()
    lines = RunFolder.open(tmp_path / "run").read_rounds()[1:]
    held = [[row["resident"] for row in line["clients"]] for line in lines]
    assert [row[1] for row in held] == [32, 32, 21, 32]
    assert len({row[0] for row in held}) == 1
    with RunFolder.open(tmp_path / "run") as folder:
        again = Keeper(folder)
    for client in range(4):
        one, other = (keeper.past(client, [8] * 4) for keeper in (run.server.keeper, again))
        assert (
            [past.loss for past in one]
            == [past.loss for past in other]
            == [line["clients"][client]["last_loss"] for line in lines]
        )
        assert all(torch.equal(torch.cat(a.held), torch.cat(b.held)) for a, b in zip(one, other, strict=True))


def test_who_ran_out_of_memory_begins_again() -> None:
    assert planned(wish(rounds(MANY, 1.0), 2))[0] == [[1, 0, 0, 0], [0, 0, 0, 1]]
