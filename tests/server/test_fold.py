"""The fold of a round against hand-worked numbers."""

import torch

from hfedmoe.config import MethodConfig
from hfedmoe.server.fold import Fold
from hfedmoe.wire.messages import Update
from tests.server.updates import update_of

E = 4


def update(expert_rows: list[float], trained: list[int], gate: float, examples: int, **vectors: list[float]) -> Update:
    flags = torch.zeros(E, dtype=torch.bool)
    flags[trained] = True
    given = {"usage": [0.25] * E, "importance": [0.5] * E, "tokens": [1.0] * E, **vectors}
    return update_of(
        tensors={
            "experts.0.up_b": torch.tensor(expert_rows)[:, None],
            "router.0.weight": torch.full((E, 2), gate),
            "shared.norm": torch.tensor([gate]),
        },
        trained=[flags],
        examples=examples,
        **{name: [torch.tensor(values)] for name, values in given.items()},
    )


def fold_in(fold: Fold, update: Update) -> None:
    """Of a client that held what it trained."""
    fold.add(update, update.trained, update.work.examples)


def start() -> dict[str, torch.Tensor]:
    return {
        "experts.0.up_b": torch.tensor([[9.1], [9.2], [9.3], [9.4]]),
        "router.0.weight": torch.full((E, 2), 7.7),
        "shared.norm": torch.tensor([5.5]),
    }


def test_experts_by_who_trained_them_gates_by_importance_the_rest_by_examples() -> None:
    fold = Fold(start(), MethodConfig(tau=0.1))
    fold_in(fold, update([1.0, 2.0], [0, 1], gate=1.0, examples=1, importance=[0.2] * E))
    fold_in(fold, update([5.0, 6.0], [1, 2], gate=3.0, examples=3, importance=[0.6] * E))
    new = fold.result()
    # expert 1: (1 * 2 + 3 * 5) / 4; expert 3: nobody, so its bits stay
    assert new["experts.0.up_b"][:, 0].tolist() == [1.0, 4.25, 6.0, start()["experts.0.up_b"][3, 0].item()]
    # alpha: sum_e u s = 4 * 0.25 * 0.2 = 0.2 and 0.6, so weights 1/4 and 3/4
    torch.testing.assert_close(new["router.0.weight"], torch.full((E, 2), 2.5))
    torch.testing.assert_close(new["shared.norm"], torch.tensor([2.5]))  # (1 * 1 + 3 * 3) / 4


def test_with_eq_17_off_clients_that_did_not_train_an_expert_hold_it_back() -> None:
    fold = Fold(start(), MethodConfig(tau=4.0, expert_weight="all"))
    fold_in(fold, update([1.0, 2.0], [0, 1], gate=1.0, examples=1))
    fold_in(fold, update([5.0, 6.0], [1, 2], gate=3.0, examples=3))
    rows = fold.result()["experts.0.up_b"][:, 0]
    # expert 0: (1 * 1 + 3 * 9.1) / 4; expert 1: both trained it; expert 2: (1 * 9.3 + 3 * 6) / 4; expert 3: nobody
    torch.testing.assert_close(rows[:3], torch.tensor([7.075, 4.25, 6.825]))
    assert rows[3].equal(start()["experts.0.up_b"][3, 0])


def test_a_step_of_the_server_goes_beyond_the_mean_only_where_somebody_trained() -> None:
    plus = MethodConfig(name="hfedmoe+", options={"server_step": 1.5})
    fold = Fold(start(), plus)
    fold_in(fold, update([1.0, 2.0], [0, 1], gate=1.0, examples=1))
    fold_in(fold, update([5.0, 6.0], [1, 2], gate=3.0, examples=3))
    new = fold.result()
    # expert 1: the mean is (1 * 2 + 3 * 5) / 4 = 4.25, and 9.2 + 1.5 (4.25 - 9.2) = 1.775; expert 3 keeps its bits
    torch.testing.assert_close(new["experts.0.up_b"][:3, 0], torch.tensor([-3.05, 1.775, 4.35]))
    assert new["experts.0.up_b"][3].equal(start()["experts.0.up_b"][3])
    # rows of the gate likewise: row 1 has both clients, 2.0 in the mean; nobody trained expert 3
    torch.testing.assert_close(new["router.0.weight"][:3, 0], torch.tensor([-2.35, -0.85, 0.65]))
    assert new["router.0.weight"][3].equal(start()["router.0.weight"][3])


def test_an_expert_below_the_usage_threshold_does_not_count_although_trained() -> None:
    fold = Fold(start(), MethodConfig(tau=0.5))  # threshold 0.5 / 4 = 0.125
    fold_in(fold, update([1.0, 2.0], [0, 1], gate=1.0, examples=1, usage=[0.125, 0.1, 0.4, 0.375]))
    fold_in(fold, update([5.0], [1], gate=1.0, examples=1))
    new = fold.result()
    assert new["experts.0.up_b"][:2, 0].tolist() == [1.0, 5.0]


def test_gate_rows_follow_those_who_trained_the_expert() -> None:
    fold = Fold(start(), MethodConfig(gate="rows"))
    fold_in(fold, update([1.0], [0], gate=1.0, examples=100))
    fold_in(fold, update([1.0, 1.0], [0, 1], gate=3.0, examples=1, usage=[0.75, 0.25, 0.0, 0.0]))
    gate = fold.result()["router.0.weight"]
    # row 0: weights u s = 0.125 and 0.375 -> 1/4 * 1 + 3/4 * 3; row 1: the second alone; rows 2 and 3: nobody
    assert gate[:, 0].tolist() == [
        2.5,
        3.0,
        start()["router.0.weight"][2, 0].item(),
        start()["router.0.weight"][3, 0].item(),
    ]


def test_gates_fall_back_to_examples_when_every_alpha_is_zero() -> None:
    fold = Fold(start(), MethodConfig())
    for gate, examples in ((1.0, 1), (5.0, 3)):
        fold_in(fold, update([], [], gate=gate, examples=examples, importance=[0.0] * E))
    torch.testing.assert_close(fold.result()["router.0.weight"], torch.full((E, 2), 4.0))


def test_expert_weights_by_tokens_and_by_importance() -> None:
    for rule, expected in (("tokens", (10 * 1.0 + 30 * 5.0) / 40), ("importance", (2 * 0.5 * 1.0 + 1 * 1.0 * 5.0) / 2)):
        fold = Fold(start(), MethodConfig(expert_weight=rule))
        fold_in(fold, update([1.0], [0], gate=1.0, examples=2, tokens=[10.0] * E, importance=[0.5] * E))
        fold_in(fold, update([5.0], [0], gate=1.0, examples=1, tokens=[30.0] * E, importance=[1.0] * E))
        torch.testing.assert_close(fold.result()["experts.0.up_b"][0, 0], torch.tensor(expected))


def test_layers_with_different_numbers_of_experts() -> None:
    tensors = {"experts.0.up_b": torch.zeros(2, 1), "experts.1.up_b": torch.zeros(3, 1)}
    fold = Fold(tensors, MethodConfig())
    for value, examples in ((1.0, 1), (5.0, 3)):
        fold_in(
            fold,
            update_of(
                tensors={
                    "experts.0.up_b": torch.tensor([[value]]),
                    "experts.1.up_b": torch.tensor([[value], [-value]]),
                },
                trained=[torch.tensor([False, True]), torch.tensor([True, False, True])],
                usage=[torch.full((2,), 0.5), torch.full((3,), 1 / 3)],
                importance=[torch.ones(2), torch.ones(3)],
                tokens=[torch.ones(2), torch.ones(3)],
                examples=examples,
            ),
        )
    new = fold.result()
    assert new["experts.0.up_b"][:, 0].tolist() == [0.0, 4.0]
    assert new["experts.1.up_b"][:, 0].tolist() == [4.0, 0.0, -4.0]


def test_exact_lora_averages_products() -> None:
    torch.manual_seed(0)
    tensors = {
        "experts.0.up_a": torch.randn(2, 1, 3),
        "experts.0.up_b": torch.randn(2, 5, 1),
    }
    fold = Fold(tensors, MethodConfig(), exact_lora=True, rank=1)
    a, b = torch.randn(1, 1, 3), torch.randn(2, 1, 5, 1)
    for client in range(2):  # the same A, so the mean product has rank 1 and is kept exactly
        fold_in(
            fold,
            update_of(
                tensors={"experts.0.up_a": a, "experts.0.up_b": b[client]},
                trained=[torch.tensor([True, False])],
                usage=[torch.tensor([0.5, 0.5])],
                importance=[torch.tensor([0.5, 0.5])],
                tokens=[torch.tensor([1.0, 1.0])],
                examples=1 + 2 * client,
            ),
        )
    new = fold.result()
    expected = (b[0, 0] @ a[0] + 3 * b[1, 0] @ a[0]) / 4
    torch.testing.assert_close(new["experts.0.up_b"][0] @ new["experts.0.up_a"][0], expected)
    assert torch.equal(new["experts.0.up_a"][1], tensors["experts.0.up_a"][1])


def test_exact_lora_averages_the_products_of_the_attention_too() -> None:
    generator = torch.Generator().manual_seed(0)
    name = "shared.layers.0.q_proj.lora_{}.default.weight"

    def sent(rank: int) -> dict[str, torch.Tensor]:
        shapes = {"A": (rank, 5), "B": (6, rank)}
        return {name.format(part): torch.randn(shape, generator=generator) for part, shape in shapes.items()}

    fold = Fold(sent(4), MethodConfig(), exact_lora=True, rank=4)
    clients = [(sent(4), 1), (sent(4), 3)]
    for tensors, examples in clients:
        for part, own in (("A", slice(0, 2)), ("B", (slice(None), slice(0, 2)))):  # of rank 2: the sum has rank 4
            whole = torch.zeros_like(tensors[name.format(part)])
            whole[own] = tensors[name.format(part)][own]
            tensors[name.format(part)] = whole
        given = {"usage": [torch.full((E,), 0.25)], "importance": [torch.ones(E)], "tokens": [torch.ones(E)]}
        fold_in(fold, update_of(tensors, trained=[torch.zeros(E, dtype=torch.bool)], examples=examples, **given))
    new = fold.result()
    products = [tensors[name.format("B")] @ tensors[name.format("A")] for tensors, _ in clients]
    expected = (products[0] + 3 * products[1]) / 4
    torch.testing.assert_close(new[name.format("B")] @ new[name.format("A")], expected)


def test_gate_rows_are_those_of_experts_and_the_rest_goes_by_importance() -> None:
    """LongCat scores identities beside its experts, Gemma scales the input of its router."""
    before = {
        "router.0.weight": torch.full((E + 1, 2), 7.0),
        "router.0.scale": torch.full((3,), 7.0),
        "router.0.bias": torch.full((E,), 7.0),
    }
    fold = Fold(before, MethodConfig(gate="rows"))
    for value, trained, importance in ((1.0, [0], 0.2), (3.0, [0, 1], 0.6)):
        flags = torch.zeros(E, dtype=torch.bool)
        flags[trained] = True
        given = {"usage": [torch.full((E,), 0.25)], "importance": [torch.full((E,), importance)]}
        tensors = {name: torch.full_like(tensor, value) for name, tensor in before.items()}
        fold_in(fold, update_of(tensors, trained=[flags], examples=1, tokens=[torch.ones(E)], **given))
    new = fold.result()
    # expert 0: p = 0.05 and 0.15, so 1/4 and 3/4; expert 1 by the second; what is no expert's: alpha 1/4 and 3/4
    assert new["router.0.weight"][:, 0].tolist() == [2.5, 3.0, 7.0, 7.0, 2.5]
    assert new["router.0.bias"].tolist() == [2.5, 3.0, 7.0, 7.0]
    assert new["router.0.scale"].tolist() == [2.5] * 3


def test_fedavg_averages_everything_over_all_holders_stale_copies_included() -> None:
    fold = Fold(start(), MethodConfig(name="fedavg"))
    everything = [torch.ones(E, dtype=torch.bool)]
    for rows, gate, examples in (([1.0, 2.0, 3.0, 4.0], 1.0, 1), ([5.0, 6.0, 7.0, 8.0], 3.0, 3)):
        # Neither trained anything, and nothing is used: plain averaging asks for none of that.
        sent = update(rows, [], gate, examples, usage=[1.0, 0.0, 0.0, 0.0], importance=[0.0] * E)
        sent.sent = everything
        fold.add(sent, everything, examples)
    new = fold.result()
    assert new["experts.0.up_b"][:, 0].tolist() == [4.0, 5.0, 6.0, 7.0]  # (1 * x + 3 * (x + 4)) / 4
    assert new["router.0.weight"][:, 0].tolist() == [2.5] * E
    assert new["shared.norm"].tolist() == [2.5]


def test_a_mean_over_holders_counts_held_experts_only() -> None:
    """A rival that sends what it holds: an expert counts for who held it, whether or not it was trained."""
    fold = Fold(start(), MethodConfig(name="random"))
    for rows, held, examples in (([1.0, 2.0], [0, 1], 1), ([6.0, 7.0], [1, 2], 3)):
        flags = torch.zeros(E, dtype=torch.bool)
        flags[held] = True
        sent = update(rows, [1], gate=1.0, examples=examples)
        sent.sent = [flags]
        fold.add(sent, [flags], examples)
    assert fold.result()["experts.0.up_b"][:, 0].tolist() == [1.0, 5.0, 7.0, start()["experts.0.up_b"][3, 0].item()]
