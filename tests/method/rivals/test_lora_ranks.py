"""HetLoRA and FlexLoRA: what their pairs count, and that a client trains, sends and gets its own rank."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hfedmoe.client.history import ClientHistory
from hfedmoe.config import MethodConfig, RunConfig
from hfedmoe.errors import UserError
from hfedmoe.method.methods import METHODS
from hfedmoe.method.rivals.lora_ranks import by_norm
from hfedmoe.models.tiny import tiny_model
from hfedmoe.models.wrapping import wrap
from hfedmoe.server.fold import Fold
from tests.federation import Federation
from tests.server.updates import update_of

Make = Callable[..., Federation]
QUICK = (
    "data.test_rows=6",
    "evaluation.watch_rows=1",
    "federation.rounds=1",
    "train.rank=4",
    'clients.budgets=["100%","25%"]',
)


def test_hetlora_weighs_pairs_by_the_norm_of_their_product_where_they_were_trained() -> None:
    a = torch.tensor([[[3.0, 4.0]], [[3.0, 4.0]], [[0.0, 1.0]]])
    b = torch.tensor([[[2.0]], [[2.0]], [[1.0]]])
    assert by_norm(a, b, torch.tensor([20.0, 0.0, 20.0])).tolist() == [10.0, 0.0, 1.0]


@pytest.mark.parametrize("name", ["hetlora", "flexlora"])
def test_the_server_folds_pairs_of_several_ranks(name: str) -> None:
    """One expert, in = out = 2. Client 0 has rank 2, diag(8, 4); client 1 rank 1, diag(4, 0), and three times the rows.

    hetlora: norms 80^0.5 and 4. flexlora: (diag(8, 4) + 3 diag(4, 0)) / 4 = diag(5, 1).
    """
    like = {"experts.0.up_a": torch.eye(2)[None], "experts.0.up_b": torch.zeros(1, 2, 2)}
    fold = Fold(like, MethodConfig(name=name), exact_lora=name == "flexlora", rank=2)
    wide = (torch.eye(2)[None], torch.diag(torch.tensor([8.0, 4.0]))[None])
    thin = (torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[4.0], [0.0]]]))
    one, flag = [torch.ones(1)], [torch.tensor([True])]
    for (a, b), examples in ((wide, 1), (thin, 3)):
        fold.add(update_of({"experts.0.up_a": a, "experts.0.up_b": b}, flag, one, one, one), flag, examples)
    new = fold.result()
    a, b = new["experts.0.up_a"][0], new["experts.0.up_b"][0]
    if name == "flexlora":
        torch.testing.assert_close(b @ a, torch.diag(torch.tensor([5.0, 1.0])))
        return
    share = 80**0.5 / (80**0.5 + 4)
    torch.testing.assert_close(a, torch.diag(torch.tensor([1.0, share])))
    torch.testing.assert_close(b, torch.diag(torch.tensor([8 * share + 4 * (1 - share), 4 * share])))


@pytest.mark.parametrize("name", ["hetlora", "flexlora"])
@pytest.mark.parametrize("attention", [False, True])
def test_a_client_gets_trains_and_sends_its_own_rank(federation: Make, name: str, attention: bool) -> None:
    run = federation(*QUICK, f"method.name={name}", f"train.attention={str(attention).lower()}")
    seen: dict[int, set[int]] = {}
    for device in run.devices:
        honest = device.train

        def train(history, resident, tensors, round, honest=honest, device=device):  # type: ignore[no-untyped-def]
            update = honest(history, resident, tensors, round)
            seen[device.number] = ranks_of(tensors) | ranks_of(update.tensors)
            return update

        device.train = train  # type: ignore[method-assign]
    model = run.prepared.model
    before = [state.trained for state in model.states]
    run.run()
    assert seen == {0: {4}, 1: {1}, 2: {4}, 3: {1}}
    assert ranks_of(run.server.tensors) == {4}
    assert all(now is then for now, then in zip([state.trained for state in model.states], before, strict=True))
    assert ranks_of(dict(model.shared)) <= {4}
    pairs = sum(key.endswith(("_a", "_b")) or "lora_" in key for key in run.server.tensors)
    assert pairs == 4 * 4 + (4 * 4 * 2 if attention else 0)


def ranks_of(tensors: dict[str, Tensor]) -> set[int]:
    a = {tensor.shape[-2] for key, tensor in tensors.items() if key.endswith("_a") or ".lora_A." in key}
    return a | {tensor.shape[-1] for key, tensor in tensors.items() if key.endswith("_b") or ".lora_B." in key}


def test_a_client_that_sends_another_rank_than_its_own_is_left_out(federation: Make) -> None:
    run = federation(*QUICK, "method.name=hetlora", "federation.min_clients=3")
    liar = run.devices[1]
    honest = liar.train

    def train(history, resident, tensors, round):  # type: ignore[no-untyped-def]
        update = honest(history, resident, tensors, round)
        for key in [key for key in update.tensors if key.endswith("_a")]:
            update.tensors[key] = update.tensors[key].repeat(1, 4, 1)
        return update

    liar.train = train  # type: ignore[method-assign]
    run.run()
    (done,) = [row for row in run.server.keeper.folder.read_rounds()[-1]["clients"] if row["client"] == 1]  # type: ignore[union-attr]
    assert done["status"] == "invalid"
    assert "expected" in done["reason"]


def test_a_server_that_sends_another_rank_is_refused(federation: Make) -> None:
    run = federation(*QUICK, "method.name=hetlora")
    device = run.devices[1]
    everything = [torch.ones(8, dtype=torch.bool)] * 4
    with pytest.raises(ValueError, match=r"experts\.0\.up_a: shape \(8, 4, 64\), expected \(8, 1, 64\)"):
        device.train(ClientHistory.new(device.model.num_experts), everything, run.server.tensors, 1)


def test_without_pairs_there_are_no_ranks() -> None:
    for train in ({"experts": "full"}, {"lora": "freeze_a"}):
        config = RunConfig.model_validate({"train": train, "method": {"name": "flexlora"}})
        with pytest.raises(UserError, match="gives clients LoRA pairs of different ranks"):
            wrap(tiny_model(50, 0), config)
    assert METHODS["flexlora"].averages_products("factors")
    assert not METHODS["hetlora"].averages_products("exact")
    assert METHODS["hfedmoe"].averages_products("exact")
