"""What the gate of each client counts, layer by layer."""

import pytest
import torch
from torch import Tensor

from hfedmoe.config import MethodConfig
from hfedmoe.server.fold import Fold
from hfedmoe.wire.messages import Update
from tests.server.updates import update_of

BOTH = [torch.tensor([True, True])] * 2
START = {f"router.{layer}.weight": torch.zeros(2, 1) for layer in range(2)}


def layered(
    gate: float, examples: int, importance: list[tuple[float, float]], tensors: dict[str, Tensor] | None = None
) -> Update:
    """Two layers of two experts; with tau = 0.5 the threshold is 0.25, so expert 1 is not used."""
    return update_of(
        {name: torch.full((2, 1), gate) for name in START} if tensors is None else tensors,
        [torch.tensor([True, True])] * 2,
        [torch.tensor([0.9, 0.1])] * 2,
        [torch.tensor(layer) for layer in importance],
        [torch.ones(2)] * 2,
        examples,
    )


@pytest.mark.parametrize(("rule", "expected"), [("importance", [2.5, 1.5]), ("fedavg", [34 / 6, 34 / 6])])
def test_every_layer_has_its_own_alpha(rule: str, expected: list[float]) -> None:
    nothing = layered(9.0, 3, [(0.0, 0.9)] * 2)
    one, other = layered(1.0, 1, [(0.2, 0.9), (0.6, 0.0)]), layered(3.0, 2, [(0.6, 0.0), (0.2, 0.9)])
    for order in ((one, other, nothing), (nothing, one, other), (one, nothing, other)):
        fold = Fold(START, MethodConfig(gate=rule, tau=0.5))
        for update in order:
            fold.add(update, update.trained, update.work.examples)
        new = fold.result()
        for layer, value in enumerate(expected):
            torch.testing.assert_close(new[f"router.{layer}.weight"], torch.full((2, 1), value))


def test_gates_as_printed_shrink() -> None:
    start = {name: torch.full((2, 1), 7.0) for name in START}
    fold = Fold(start, MethodConfig(gate="printed", tau=0.5))
    fold.add(layered(1.0, 1, [(0.2, 0.9), (0.0, 0.0)]), BOTH, 1)
    fold.add(layered(3.0, 2, [(0.6, 0.9), (0.0, 0.0)]), BOTH, 2)
    new = fold.result()
    # S = {0}, |S| = 1; alpha = 0.9 * 0.2 and 0.9 * 0.6: 0.18 * 1 + 0.54 * 3
    torch.testing.assert_close(new["router.0.weight"], torch.full((2, 1), 1.8))
    assert torch.equal(new["router.1.weight"], torch.zeros(2, 1))  # nothing is of importance
    nobody = Fold(start, MethodConfig(gate="printed", tau=0.5)).result()
    assert torch.equal(nobody["router.0.weight"], start["router.0.weight"])


def test_rows_of_gates_are_weighted_by_their_own_layer_and_threshold() -> None:
    fold = Fold(START, MethodConfig(gate="rows", tau=0.5))
    fold.add(layered(1.0, 1, [(0.2, 0.9), (0.6, 0.9)]), BOTH, 1)
    fold.add(layered(3.0, 1, [(0.6, 0.9), (0.2, 0.9)]), BOTH, 1)
    new = fold.result()
    torch.testing.assert_close(new["router.0.weight"][:, 0], torch.tensor([2.5, 0.0]))  # row 1 is below tau: kept
    torch.testing.assert_close(new["router.1.weight"][:, 0], torch.tensor([1.5, 0.0]))


def test_products_of_both_projections_are_weighted_by_their_own_layer() -> None:
    draws = torch.Generator().manual_seed(0)
    shapes = {
        f"experts.{layer}.{side}_{part}": (2, 1, 3) if part == "a" else (2, 4, 1)
        for layer in range(2)
        for side in ("up", "down")
        for part in "ab"
    }
    start = {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}
    fold = Fold(start, MethodConfig(expert_weight="importance", tau=0.0), exact_lora=True, rank=1)
    a = {name: torch.randn(shape, generator=draws) for name, shape in shapes.items() if name.endswith("_a")}
    sent: list[dict[str, Tensor]] = []
    for scale, importance in ((1, [(1.0, 1.0), (3.0, 3.0)]), (2, [(3.0, 3.0), (1.0, 1.0)])):
        own = {name: factor * scale for name, factor in a.items()}  # along the same A, so the mean has rank 1
        own |= {name: torch.randn(shape, generator=draws) for name, shape in shapes.items() if name.endswith("_b")}
        sent.append(own)
        fold.add(layered(0.0, 1, importance, tensors=own), BOTH, 1)
    new = fold.result()
    for layer, weights in enumerate(((1, 3), (3, 1))):
        for side in ("up", "down"):
            names = [f"experts.{layer}.{side}_{part}" for part in "ba"]
            products = [own[names[0]] @ own[names[1]] for own in sent]
            expected = sum(weight * product for weight, product in zip(weights, products, strict=True)) / 4
            torch.testing.assert_close(new[names[0]] @ new[names[1]], expected)
