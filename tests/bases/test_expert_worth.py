"""What the study of scores measures, against the long way: every expert by itself, every layer computed again."""

from functools import partial

import pytest
import torch
from benchmarks.expert_clients import BLOCK, clients_of
from benchmarks.expert_scores import ALL, SPENDS, main, measure
from benchmarks.expert_tables import correlations, rank_correlation, tables
from benchmarks.expert_worth import Steps, Texts, gains, kept, leave_one_out, scores, trained
from torch import Tensor

from hfedmoe.bases.texts import Piece
from hfedmoe.method.running import RunningScore
from hfedmoe.method.scores import score
from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.routing.tokens import TokenMasks
from tests.families.table import build

LR = 2e-3


def rows_of(number: int, seed: int = 0) -> list[Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 61, (4 + place % 5,), generator=draws) for place in range(number)]


def wrapped() -> MoEModel:
    return MoEModel(build("olmoe").eval(), rank=4, alpha=8.0)


def long_way(model: MoEModel, rows: list[Tensor]) -> float:
    """One row after the other, without padding."""
    with torch.no_grad():
        found = [
            torch.nn.functional.cross_entropy(model.model(input_ids=row[None]).logits[0, :-1], row[1:], reduction="sum")
            for row in rows
        ]
    return float(torch.stack(found).double().sum()) / sum(len(row) - 1 for row in rows)


def test_leave_one_out_is_the_rise_without_the_expert() -> None:
    model, rows = wrapped(), rows_of(7)
    texts = Texts(model, rows, batch=3)
    assert texts.whole == pytest.approx(long_way(model, rows), abs=1e-6)
    found = leave_one_out(texts)
    assert all(layer.abs().max() > 1e-3 for layer in found)
    for layer, expert in ((0, 1), (0, 5), (1, 0), (1, 7)):
        resident = [torch.ones(number, dtype=torch.bool) for number in model.num_experts]
        resident[layer][expert] = False
        model.set_resident(resident)
        assert float(found[layer][expert]) == pytest.approx(long_way(model, rows) - texts.whole, abs=1e-5)
        model.set_resident(None)
    half = [torch.arange(number) < 4 for number in model.num_experts]
    rise = kept(texts, half)
    model.set_resident(half)
    assert rise == pytest.approx(long_way(model, rows) - texts.whole, abs=1e-5)
    assert abs(rise) > 1e-3


def test_an_expert_that_no_token_is_routed_to_is_worth_nothing() -> None:
    model = wrapped()
    texts = Texts(model, [torch.tensor([5, 6])])
    for used, worth in zip(texts.used, leave_one_out(texts), strict=True):
        assert 0 < int(used.sum()) < len(used)
        assert not worth[~used].any()


def test_a_gain_is_the_drop_after_a_step_of_the_optimizer_that_clients_use() -> None:
    own, held_out = rows_of(6, seed=1), rows_of(5, seed=2)
    model = wrapped()
    scores(model, own, 2, {})
    texts, steps = Texts(model, held_out), Steps(model, LR)
    found = gains(texts, steps)
    some = [torch.arange(number) % 2 == 0 for number in model.num_experts]
    together = trained(texts, steps, some)
    assert Texts(model, held_out).whole == texts.whole  # every step is undone, bit for bit
    for places in (
        [(0, 6)],
        [(1, 2)],
        [(layer, e) for layer in range(2) for e in range(0, model.num_experts[layer], 2)],
    ):
        other = wrapped()
        scores(other, own, 2, {})
        leaves = [stack[e] for layer, e in places for stack in other.states[layer].trained.leaves.values()]  # type: ignore[union-attr]
        torch.optim.AdamW(leaves, lr=LR, weight_decay=0.0).step()
        drop = texts.whole - long_way(other, held_out)
        assert abs(drop) > 1e-5
        measured = together if len(places) > 1 else float(found[places[0][0]][places[0][1]])
        assert measured == pytest.approx(drop, abs=2e-6)


def test_plain_descent_moves_all_experts_together_as_far_as_adam() -> None:
    model = wrapped()
    scores(model, rows_of(6), 3, {})
    leaves = [p for state in model.states for p in state.trained.parameters()]  # type: ignore[union-attr]
    everything = [(layer, e) for layer in range(2) for e in range(model.num_experts[layer])]
    moved = []
    for sgd in (False, True):
        before = [leaf.detach().clone() for leaf in leaves]
        back = Steps(model, LR, sgd).take(everything)
        moved.append([leaf.detach() - was for leaf, was in zip(leaves, before, strict=True)])
        back()
    lengths = [torch.cat([change.flatten() for change in changes]).norm() for changes in moved]
    torch.testing.assert_close(lengths[0], lengths[1], rtol=1e-3, atol=0.0)
    rate = {
        float((-change / leaf.grad).nanmean())
        for change, leaf in zip(moved[1], leaves, strict=True)
        if leaf.grad is not None and leaf.grad.any()
    }
    assert max(rate) == pytest.approx(min(rate), rel=1e-2)


def test_scores_are_the_running_means_that_a_client_keeps() -> None:
    model, rows = wrapped(), rows_of(5)
    found = scores(model, rows, 2, {name: ALL[name] for name in ("activation", "ib lam=0 beta=-1")})
    running = {name: RunningScore(model.num_experts[0]) for name in found}
    for start in range(0, 5, 2):
        own = rows[start : start + 2]
        tokens = torch.nn.utils.rnn.pad_sequence(own, batch_first=True)
        mask = torch.arange(tokens.shape[1])[None] < torch.tensor([len(row) for row in own])[:, None]
        model.watch(TokenMasks(mask), "activation")
        model.model(input_ids=tokens, attention_mask=mask.long())
        evidence = model.routing[0].evidence
        assert evidence is not None
        running["activation"].update(score("activation", evidence))
        running["ib lam=0 beta=-1"].update(score("ib", evidence, 0.0, -1.0))
    for name, layers in found.items():
        torch.testing.assert_close(layers[0], running[name].value(), atol=1e-5, rtol=1e-4)


def test_clients_have_own_and_held_out_texts_of_other_blocks() -> None:
    texts = [Piece(f"{domain} {place}", domain, domain) for domain in ("one", "two", "three") for place in range(100)]
    place_of = {piece.text: place % 100 for place, piece in enumerate(texts)}
    as_tokens = {piece.text: torch.tensor([place]) for place, piece in enumerate(texts)}
    drawn = partial(clients_of, texts, lambda some: [as_tokens[text] for text in some])
    named = list(place_of)
    for client in drawn(3, seed=0, alpha=None, own=20, held_out=30):
        assert len(client.domains) == 1
        own, held_out = ({int(row) for row in rows} for rows in (client.own, client.held_out))
        assert (len(own), len(held_out)) == (20, 30)
        assert {place_of[named[row]] // BLOCK % 2 for row in own} == {0}
        assert {place_of[named[row]] // BLOCK % 2 for row in held_out} == {1}
    first, again, other = (
        [sorted(map(int, c.own)) for c in drawn(4, seed=seed, alpha=0.5, own=20, held_out=30)] for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert any(len(client.domains) > 1 for client in drawn(4, seed=1, alpha=5.0, own=20, held_out=30))


def test_ranks_and_budgets_worked_by_hand() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
    layers = [torch.tensor([9.0, 8.0, 7.0, 6.0]), torch.tensor([4.0, 1.0, 0.0, 0.0])]
    counts = {way: [int(keep.sum()) for keep in spend(layers, 4, 1)] for way, spend in SPENDS.items()}
    # Over means: 1.2, 1.07, 0.93, 0.8 and 3.2, 0.8, 0, 0
    assert counts == {"as they are": [3, 1], "comparable": [3, 1], "mostly equal": [3, 1], "equal": [2, 2]}
    record = {
        "scores": {"taylor": [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]},
        "truth": {"kept out": [[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]},
    }
    found = correlations(record, "taylor", "kept out", lambda name: "comparable")
    assert found[:3] == pytest.approx([1.0, -1.0, 0.0])
    assert found[3] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--share", "0.01"], "must be from"),
        (["absent.json"], "absent.json: cannot be read"),
        (["tiny", "--clients", "0"], "0 is not a whole number above 0"),
        (["tiny", "--alpha", "nan"], "nan is not a number above 0"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["expert_scores", *arguments])
    try:
        code = main()
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_the_table_names_every_score_and_orders_the_extremes() -> None:
    model = wrapped()
    texts = [Piece(f"{domain} {place}", domain, domain) for domain in ("one", "two") for place in range(60)]
    pool = iter(rows_of(400, seed=5))
    records = [
        measure(model, client, 0.5, seed=0)
        for client in clients_of(texts, lambda some: [next(pool) for _ in some], 2, 0, None, 9, 6)
    ]
    for record in records:
        assert record["all experts trained"] != 0
        assert record["found"]["truth"]["experts"]["equal"] == [4, 4]
    found = {
        "machine": {"processor": "some", "torch_threads": 1, "torch": "2"},
        "model": "tiny",
        "digest": "0" * 32,
        "seconds": 1.0,
        "options": {"clients": 2, "seeds": 1, "alpha": None, "own": 9, "held_out": 6},
        "records": records,
    }
    text = tables(found, lambda name: "as they are")
    for name in [*ALL, "own truth", "draws"]:
        assert f"| `{name}` |" in text
    assert "| `truth` | 1.000 ± 0.000 |" in text
