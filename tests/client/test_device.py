"""What one client leaves behind in the model that all clients of a process share."""

from collections.abc import Callable

import pytest

from hfedmoe.client import device as module
from hfedmoe.client.history import ClientHistory
from hfedmoe.errors import TrainingError
from tests.federation import Federation


def test_a_round_that_fails_leaves_no_limit_of_experts_per_token(
    federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = federation("method.name=flame", 'clients.budgets=["25%"]')
    device = made.devices[0]
    during: list[int | None] = []

    def fail(*arguments: object, **named: object) -> None:
        during.extend(state.most_per_token for state in device.model.states)
        raise TrainingError("the loss is nan")

    monkeypatch.setattr(module, "train", fail)
    everything = device.place.plan(ClientHistory.new(device.model.num_experts), 1, None, lambda history: None)
    sent = {name: tensor for name, tensor in made.server.tensors.items() if not name.startswith("scale.")}
    with pytest.raises(TrainingError, match="the loss is nan"):
        device.train(ClientHistory.new(device.model.num_experts), everything, sent, 1)
    assert during == [1] * 4  # a quarter of top-2, one at least
    assert [state.most_per_token for state in device.model.states] == [None] * 4
