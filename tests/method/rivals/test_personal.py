"""PFL-MoE and FLEx: what a client has for itself, how it begins, and that it goes on with it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hfedmoe.client.own import begin_own
from hfedmoe.config import RunConfig
from hfedmoe.errors import UserError
from hfedmoe.method.methods import METHODS
from hfedmoe.models.tiny import tiny_model
from hfedmoe.models.wrapping import wrap
from tests.federation import Federation

Make = Callable[..., Federation]
QUICK = ("data.test_rows=6", "evaluation.watch_rows=1", "federation.rounds=2", 'clients.budgets=["100%"]')


def test_a_graft_begins_as_the_clients_best_expert_and_stays() -> None:
    tensors = {"own.0.expert": torch.tensor([-1.0]), "own.1.expert": torch.tensor([3.0])}
    first = tensors["own.0.expert"]
    begin_own(tensors, [torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.9, 0.0, 0.1])])
    assert float(tensors["own.0.expert"]) == 1.0
    assert float(tensors["own.1.expert"]) == 3.0
    assert float(first) == -1.0  # what all clients begin with is not written to


@pytest.mark.parametrize("name", ["pfl_moe", "flex"])
def test_a_client_goes_on_with_its_own_experts(federation: Make, name: str) -> None:
    run = federation(*QUICK, f"method.name={name}")
    device = run.devices[0]
    begun: list[dict[str, Tensor]] = []
    ended: list[dict[str, Tensor]] = []
    begin, honest = device._begin, device.train

    def beginning(history, resident, received):  # type: ignore[no-untyped-def]
        started = begin(history, resident, received)
        begun.append({key: tensor.clone() for key, tensor in started.items() if key.startswith("own.")})
        return started

    def train(history, resident, tensors, round):  # type: ignore[no-untyped-def]
        update = honest(history, resident, tensors, round)
        assert history.private is not None
        ended.append(dict(history.private.tensors))
        return update

    device._begin, device.train = beginning, train  # type: ignore[method-assign]
    run.run()
    assert all(float(begun[0][f"own.{layer}.expert"]) >= 0 for layer in range(4))
    assert begun[1].keys() == ended[0].keys()
    assert all(torch.equal(tensor, ended[0][key]) for key, tensor in begun[1].items())
    moved = {key.split(".", 2)[2] for key, tensor in begun[0].items() if not torch.equal(tensor, ended[1][key])}
    assert moved == {"gate.weight", "gate.bias", "up_a", "up_b", "down_a", "down_b"}
    rows = 8 if name == "pfl_moe" else 1
    assert ended[1]["own.0.up_b"].shape == (rows, 192, 8)


def test_flex_grafts_the_expert_that_the_clients_tokens_use_most(federation: Make) -> None:
    run = federation(*QUICK, "method.name=flex", "federation.rounds=1")
    found: dict[int, list[int]] = {}
    for device in run.devices:
        honest = device._begin

        def begin(history, resident, received, honest=honest, device=device):  # type: ignore[no-untyped-def]
            started = honest(history, resident, received)
            assert history.observed  # by a first pass over its rows
            found[device.number] = [int(started[f"own.{layer}.expert"]) for layer in range(4)]
            assert found[device.number] == [int(score.argmax()) for score in history.contribution()]
            return started

        device._begin = begin  # type: ignore[method-assign]
    run.run()
    assert len(found) == 4
    assert len({expert for experts in found.values() for expert in experts}) > 1


def test_what_cannot_be_copied_is_refused() -> None:
    for how in ("full", "frozen"):
        with pytest.raises(ValueError, match="it needs LoRA pairs of the experts"):
            RunConfig.model_validate({"train": {"experts": how}, "method": {"name": "pfl_moe"}})
    config = RunConfig.model_validate({"train": {"router": False}, "method": {"name": "flex"}})
    with pytest.raises(UserError, match="nothing would be trained"):
        wrap(tiny_model(50, 0), config)
    frozen = wrap(tiny_model(50, 0), RunConfig.model_validate({"method": {"name": "flex"}}))
    assert all(state.trained is None for state in frozen.states)
    assert METHODS["flex"].private == METHODS["pfl_moe"].private == {"own"}
