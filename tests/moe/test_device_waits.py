"""What makes the host wait for a GPU: once per layer and pass, for how many tokens each expert got, and no more."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.routing.tokens import TokenMasks
from tests.families.table import build, inputs

PER_BATCH = 1  # which samples have a token that counts


class Waits(TorchDispatchMode):
    """Counts operations whose result the host has to know, on whatever device they run here."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == "aten::bincount":
            self.count += 2  # it looks for the smallest and the largest value
        elif name in ("aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select"):
            self.count += 1
        elif name.startswith("aten::index"):
            indices = args[1] if isinstance(args[1], list | tuple) else ()
            self.count += any(index is not None and index.dtype == torch.bool for index in indices)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("score", [None, "taylor", "ghost"])
@pytest.mark.parametrize("residency", ["all", "masked", "budget"])
def test_the_host_waits_once_per_layer(residency: str, score: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for layers in (2, 4):
        model = MoEModel(build("mixtral", num_hidden_layers=layers))
        if residency != "all":
            model.set_resident([torch.arange(number) % 2 == 0 for number in model.num_experts])
        if residency == "budget":
            for routing in model.routing:
                routing.choose = lambda layer, evidence, hit: torch.arange(len(hit)) < 2
        x = inputs(model.model)
        model.watch(TokenMasks(x["attention_mask"]), score)
        seen = Waits()
        with monkeypatch.context() as patch, seen:
            patch.setattr(Tensor, "tolist", _counting(seen))
            hidden = model.model.model(**x, use_cache=False).last_hidden_state
            hidden.square().mean().backward()
        counts.append(seen.count)
    passes = 2 if residency == "budget" else 1  # over the experts that build a graph, and over the others
    assert counts[1] - counts[0] == 2 * passes
    assert counts[0] <= 2 * passes + PER_BATCH + _mask_waits()


def _counting(waits: Waits) -> Any:
    original = Tensor.tolist

    def tolist(self: Tensor) -> Any:
        waits.count += 1
        return original(self)

    return tolist


def _mask_waits() -> int:
    """What transformers itself asks of the attention mask, whatever the number of layers."""
    model, waits = build("mixtral"), Waits()
    with torch.no_grad(), waits:
        model.set_experts_implementation("grouped_mm")
        model.model(**inputs(model), use_cache=False)
    return waits.count
