"""The host waits for the GPU once per layer and pass, as torch itself reports it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.routing.tokens import TokenMasks
from tests.cuda.steps import batch_for
from tests.families.table import build
from tests.moe.test_device_waits import Waits

PER_BATCH = 1
"""Which samples have a token that counts."""
WORDS = "synchronizing CUDA operation"


class Count:
    """How often the host waited."""

    waits = 0


@contextmanager
def counted(device: torch.device) -> Iterator[Count]:
    """Count what torch reports; in the dry run, operations whose result the host has to know."""
    count = Count()
    if device.type != "cuda":
        seen, original = Waits(), Tensor.tolist

        def tolist(self: Tensor) -> Any:
            count.waits += 1
            return original(self)

        with pytest.MonkeyPatch.context() as patch, seen:
            patch.setattr(Tensor, "tolist", tolist)
            yield count
        count.waits += seen.count
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield count
        finally:
            torch.cuda.set_sync_debug_mode("default")
    count.waits = sum(WORDS in str(warning.message) for warning in caught)


def test_a_wait_is_counted(device: torch.device) -> None:
    """Without this, a count of zero would prove nothing."""
    values = torch.ones(3, device=device)
    with counted(device) as count:
        values.tolist()
        values.sum().item()
    assert count.waits == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("score", [None, "taylor", "ghost", "activation"])
@pytest.mark.parametrize("residency", ["all", "masked", "budget"])
def test_once_per_layer_and_pass(residency: str, score: str | None, dtype: torch.dtype, device: torch.device) -> None:
    counts = []
    for layers in (2, 4):
        model = MoEModel(build("mixtral", num_hidden_layers=layers).to(device, dtype))
        if residency != "all":
            model.set_resident([torch.arange(number) % 2 == 0 for number in model.num_experts])
        if residency == "budget":
            for routing in model.routing:
                routing.choose = lambda layer, evidence, hit: torch.arange(len(hit), device=hit.device) < 2
        x = batch_for(model)
        for _ in range(2):  # the first pass also starts what is started once
            model.watch(TokenMasks(x["attention_mask"]), score)
            with counted(device) as count:
                hidden = model.model.model(**x, use_cache=False).last_hidden_state
                hidden.square().mean().backward()
        counts.append(count.waits)
    passes = 2 if residency == "budget" else 1  # over the experts that build a graph, and over the others
    assert counts[1] - counts[0] == 2 * passes
    assert counts[0] <= 2 * passes + PER_BATCH + mask_waits(device, dtype)


def mask_waits(device: torch.device, dtype: torch.dtype) -> int:
    """What transformers itself asks of the attention mask: waits of a forward pass that are not one per layer."""
    model = MoEModel(build("mixtral", num_hidden_layers=2).to(device, dtype))
    x = batch_for(model)
    with torch.no_grad():
        for _ in range(2):
            with counted(device) as count:
                model.model.model(**x, use_cache=False)
    return count.waits - 2
