"""Clients of different ranks: what they get, train and send, and what the server makes of it."""

from collections.abc import Callable

import pytest
import torch
from flwr.app import Message, Metadata
from torch import Tensor

from hfedmoe.config import MethodConfig
from hfedmoe.errors import UserError
from hfedmoe.events import Work
from hfedmoe.method.products import product_norms
from hfedmoe.method.rivals.ranks import rank_of
from hfedmoe.moe.payload import MismatchError, extract
from hfedmoe.moe.ranks import cut, padded
from hfedmoe.server.fold import Fold
from hfedmoe.wire import checks
from hfedmoe.wire.messages import InvalidReplyError, Update, train_reply
from tests.federation import Federation, tiny_config
from tests.server.updates import update_of

A, B = "experts.0.up_a", "experts.0.up_b"
Make = Callable[..., Federation]


def rows(*experts: list[list[float]]) -> Tensor:
    return torch.tensor(experts)


def sent_by(a: Tensor, b: Tensor, experts: list[bool], examples: int) -> tuple[Update, list[Tensor], int]:
    """The arguments of `Fold.add` for a client that holds both experts of the only layer."""
    halves = [torch.full((2,), 0.5)]
    update = update_of({A: a, B: b}, [torch.tensor(experts)], halves, halves, halves, examples)
    return update, [torch.ones(2, dtype=torch.bool)], examples


BEFORE = {A: torch.full((2, 2, 2), 7.0), B: torch.full((2, 2, 2), 9.0)}


def test_a_budget_decides_the_rank() -> None:
    assert [rank_of(share, 8) for share in (1.0, 0.5, 0.25, 0.1, 0.01)] == [8, 4, 2, 1, 1]
    assert [rank_of(share, 3) for share in (1.0, 0.5, 0.1)] == [3, 2, 1]
    assert rank_of(0.5, 1) == 1


def test_a_weak_client_has_the_first_components() -> None:
    tensors = {A: rows([[1, 2, 3], [4, 5, 6]]), B: rows([[7, 8], [9, 10]]), "router.0.weight": torch.ones(2, 3)}
    short = cut(tensors, 1)
    assert short[A].tolist() == [[[1, 2, 3]]]
    assert short[B].tolist() == [[[7], [9]]]
    assert short["router.0.weight"] is tensors["router.0.weight"]
    whole = padded(short, 1, full=2)
    assert whole[A].tolist() == [[[1, 2, 3], [0, 0, 0]]]
    assert whole[B].tolist() == [[[7, 0], [9, 0]]]
    assert (whole[B] @ whole[A]).tolist() == [[[7, 14, 21], [9, 18, 27]]]  # one outer product of the two
    with pytest.raises(MismatchError, match=r"up_a: shape \(1, 2, 3\) is not of rank 1"):
        padded(tensors, 1, full=2)
    with pytest.raises(MismatchError, match=r"up_a: shape \(1, 1, 3\) is not of rank 2"):
        padded(short, 2, full=2)
    for same in (cut(tensors, None), padded(tensors, None, full=2)):
        assert all(same[name] is tensor for name, tensor in tensors.items())


def test_the_norm_of_a_product_needs_no_product() -> None:
    a, b = rows([[1, 0], [0, 1]], [[0, 0], [0, 0]]), rows([[3, 0], [0, 4]], [[1, 1], [1, 1]])
    assert product_norms(a, b).tolist() == [5, 0]  # the norm of diag(3, 4), and of 0
    torch.manual_seed(0)
    a, b = torch.randn(3, 2, 7), torch.randn(3, 5, 2)
    torch.testing.assert_close(product_norms(a, b), (b @ a).flatten(1).norm(dim=1))


def test_hetlora_fills_up_with_zeros_and_weighs_by_the_norm_of_the_product() -> None:
    fold = Fold(BEFORE, MethodConfig(name="hetlora"), rank=2)
    # Both experts: norm 3, and 10 rows: 30.
    fold.add(*sent_by(rows([[3, 0]], [[3, 0]]), rows([[1], [0]], [[1], [0]]), [True, True], 10))
    # The first expert only: the norm of diag(3, 4) is 5, and 18 rows: 90.
    fold.add(*sent_by(rows([[1, 0], [0, 1]]), rows([[3, 0], [0, 4]]), [True, False], 18))
    new = fold.result()
    torch.testing.assert_close(new[A][0], torch.tensor([[1.5, 0.0], [0.0, 0.75]]))  # (3 + 3 x 1) / 4, 3/4 x 1
    torch.testing.assert_close(new[B][0], torch.tensor([[2.5, 0.0], [0.0, 3.0]]))  # (1 + 3 x 3) / 4, 3/4 x 4
    # Of the second expert only the first component arrived: the other keeps its values.
    assert new[A][1].tolist() == [[3, 0], [7, 7]]
    assert new[B][1].tolist() == [[1, 9], [0, 9]]


def test_flexlora_averages_products_and_gives_every_client_the_best_of_its_rank() -> None:
    fold = Fold(BEFORE, MethodConfig(name="flexlora"), exact_lora=True, rank=2)
    # Two clients of rank 1, 1 and 3 rows: 4 e1 e1^T and 4 e2 e2^T have the mean diag(1, 3).
    fold.add(*sent_by(rows([[4, 0]]), rows([[1], [0]]), [True, False], 1))
    fold.add(*sent_by(rows([[0, 2]]), rows([[0], [2]]), [True, False], 3))
    # Only one client sent the second expert, its smaller component first: diag(1, 5).
    fold.add(*sent_by(rows([[1, 0], [0, 1]]), rows([[1, 0], [0, 5]]), [False, True], 2))
    new = fold.result()
    products, best = new[B] @ new[A], cut(new, 1)
    torch.testing.assert_close(products, rows([[1.0, 0.0], [0.0, 3.0]], [[1.0, 0.0], [0.0, 5.0]]))
    torch.testing.assert_close(best[B] @ best[A], rows([[0.0, 0.0], [0.0, 3.0]], [[0.0, 0.0], [0.0, 5.0]]))


@pytest.mark.parametrize("name", ["hetlora", "flexlora"])
def test_they_need_lora_pairs_whose_factors_both_change(name: str) -> None:
    assert tiny_config(f"method.name={name}").train.experts == "lora"
    for experts in ("full", "frozen"):
        with pytest.raises(UserError, match=f'"{name}": it needs LoRA pairs .* train.experts = "lora" .*"{experts}"'):
            tiny_config(f"method.name={name}", f"train.experts={experts}")
    with pytest.raises(UserError, match=f'"{name}": it changes both factors .* is "freeze_a"'):
        tiny_config(f"method.name={name}", "train.lora=freeze_a")
    tiny_config("method.name=flame", "train.experts=full", "train.lora=freeze_a")


def test_the_server_takes_a_client_s_own_rank_and_no_other() -> None:
    halves, flags = [torch.full((2,), 0.5)], [torch.tensor([True, False])]
    work = Work(examples=10, steps=1, steps_wanted=1, first_loss=1.0, last_loss=1.0, mean_loss=1.0)
    pair = {A: torch.ones(1, 2, 2), B: torch.ones(1, 2, 2)}

    def checked(tensors: dict[str, Tensor], rank: int) -> Update:
        content = train_reply(Update(tensors, flags, flags, halves, halves, halves, work))
        metadata = Metadata(1, "1", 1, 0, "", "", 0.0, 60.0, "train")
        message = Message(content, metadata=metadata)  # type: ignore[call-overload]
        return checks.update(message, flags, BEFORE, checks.Asked(1, [10], exact=True), rank)

    assert checked(cut(pair, 1), 1).tensors[A].shape == (1, 1, 2)
    assert checked(pair, 2).tensors[A].shape == (1, 2, 2)
    with pytest.raises(InvalidReplyError, match=r"up_a has shape \(1, 2, 2\), expected \(1, 1, 2\)"):
        checked(pair, 1)
    with pytest.raises(InvalidReplyError, match=r"up_a has shape \(1, 1, 2\), expected \(1, 2, 2\)"):
        checked(cut(pair, 1), 2)


@pytest.mark.parametrize("name", ["hetlora", "flexlora"])
def test_only_a_client_s_own_components_travel_and_are_trained(federation: Make, name: str) -> None:
    """Weight decay would show in anything that is not 0."""
    settings = ("data.test_rows=6", "evaluation.watch_rows=1", "train.batch_size=2", "train.weight_decay=0.1")
    budgets = 'clients.budgets=["25%","50%","100%","40%"]'
    run = federation(*settings, f"method.name={name}", "train.rank=4", budgets)
    ranks = [1, 2, 4, 2]
    assert [device.place.rank for device in run.devices] == ranks
    seen = []
    for device, rank in zip(run.devices, ranks, strict=True):
        honest = device.train

        def train(history, resident, tensors, round, honest=honest, device=device, rank=rank):  # type: ignore[no-untyped-def]
            update = honest(history, resident, tensors, round)
            for group in (tensors, update.tensors):
                for key in (key for key in group if key.startswith("experts.")):
                    assert group[key].shape[1 if key.endswith("_a") else 2] == rank
            for key, tensor in extract(device.model, update.trained).items():
                if key.startswith("experts."):
                    own, others = tensor.split([rank, 4 - rank], 1 if key.endswith("_a") else 2)
                    assert own.any()
                    assert not others.any()
            seen.append(device.number)
            return update

        device.train = train  # type: ignore[method-assign]
    before = {key: tensor.clone() for key, tensor in run.server.tensors.items()}
    run.run()
    assert seen == [0, 1, 2, 3] * 2
    key = "experts.0.down_b"
    assert run.server.tensors[key].shape == before[key].shape
    moved = (run.server.tensors[key] - before[key]).abs().sum((0, 1))
    assert bool((moved > 0).all())  # every component, by the strongest client
