"""A tree of folds, as regional aggregators would make it, is one fold."""

import pytest
import torch
from torch import Tensor

from hfedmoe.config import MethodConfig
from hfedmoe.method.averaging import StacksAverage
from hfedmoe.method.methods import METHODS
from hfedmoe.method.products import ProductAverage
from hfedmoe.server.fold import Fold
from hfedmoe.wire.messages import Update
from tests.server.updates import update_of

E, LAYERS, RANK, CLIENTS = 6, 2, 2, 9


def global_tensors() -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(1)
    shapes = {f"experts.{layer}.up_a": (E, RANK, 5) for layer in range(LAYERS)}
    shapes |= {f"experts.{layer}.up_b": (E, 4, RANK) for layer in range(LAYERS)}  # type: ignore[dict-item]
    shapes |= {f"router.{layer}.weight": (E, 3) for layer in range(LAYERS)}  # type: ignore[dict-item]
    return {name: torch.randn(shape, generator=draws) for name, shape in {**shapes, "shared.norm": (3,)}.items()}


def updates() -> list[Update]:
    draws = torch.Generator().manual_seed(2)
    found = []
    for client in range(CLIENTS):
        trained = [torch.rand(E, generator=draws) < 0.5 for _ in range(LAYERS)]
        trained[0][5] = False  # nobody trains it
        tensors = {}
        for name, tensor in global_tensors().items():
            rows = int(trained[int(name.split(".")[1])].sum()) if name.startswith("experts.") else len(tensor)
            tensors[name] = torch.randn(rows, *tensor.shape[1:], generator=draws)
        usage = [torch.softmax(torch.randn(E, generator=draws), 0) for _ in range(LAYERS)]
        importance = [torch.rand(E, generator=draws) * (client != 4) for _ in range(LAYERS)]
        tokens = [torch.rand(E, generator=draws) * 50 for _ in range(LAYERS)]
        found.append(update_of(tensors, trained, usage, importance, tokens, examples=10 * client + 1))
    return found


def folded(settings: MethodConfig, exact: bool, regions: list[list[int]]) -> dict[str, Tensor]:
    """One fold of the folds of these clients."""
    folds = []
    for region in regions:
        fold = Fold(global_tensors(), settings, exact, RANK)
        for client in region:
            update = updates()[client]
            fold.add(update, update.trained, update.work.examples)
        folds.append(fold)
    root = folds[0]
    for fold in folds[1:]:
        root.merge(fold)
    assert root.clients == CLIENTS
    return root.result()


FLAT, TREE = [list(range(CLIENTS))], [[0, 3, 8], [], [5], [1, 2, 4, 6, 7]]


@pytest.mark.parametrize(
    ("settings", "exact"),
    [
        ({}, False),
        ({"gate": "rows"}, False),
        ({"gate": "printed"}, False),
        ({"expert_weight": "all"}, False),
        ({"expert_weight": "tokens", "gate": "fedavg"}, False),
        ({}, True),
        ({"name": "hfedmoe+"}, False),
        *(({"name": name}, False) for name, method in METHODS.items() if method.combine is not None),
    ],
)
def test_a_tree_of_folds_is_one_fold(settings: dict[str, str], exact: bool) -> None:
    flat, tree = (folded(MethodConfig(**settings), exact, regions) for regions in (FLAT, TREE))  # type: ignore[arg-type]
    before = global_tensors()
    for name, tensor in flat.items():
        torch.testing.assert_close(tree[name], tensor, rtol=1e-4 if exact else 1e-5, atol=1e-5 if exact else 1e-6)
        assert not torch.equal(tensor, before[name])
    if not exact:
        for name in ("experts.0.up_a", "experts.0.up_b"):
            assert torch.equal(tree[name][5], before[name][5])  # nobody trained it: its bits stay


def test_other_stacks_experts_or_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="different stacks"):
        StacksAverage({"a": (0, 2)}).merge(StacksAverage({"a": (0, 3)}))
    with pytest.raises(ValueError, match="another rank"):
        ProductAverage(2, 2).merge(ProductAverage(2, 3))
