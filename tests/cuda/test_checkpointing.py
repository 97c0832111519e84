"""Recomputed activations: the same gradients as with kept ones, on the GPU."""

import pytest
import torch
from torch import Tensor

from hfedmoe.moe.routing.tokens import TokenMasks
from tests.cuda.comparing import FLOAT32, assert_near, is_nonzero
from tests.cuda.steps import batch_for, stepped, wrapped


@pytest.mark.parametrize(
    ("family", "attention"),
    [("mixtral", False), ("mixtral", True), ("gpt_oss", True), ("deepseek_v3", False), ("switch_transformers", False)],
)
def test_the_gradients_are_those_without(family: str, attention: bool, device: torch.device) -> None:
    results = []
    for recomputed in (True, False):
        model = wrapped(family, device, attention=attention)
        if recomputed:
            model.checkpoint_activations()
        results.append(stepped(model, batch_for(model)))
    assert is_nonzero([value for name, value in results[1].items() if "up_a" in name])
    assert_near(results[0], results[1], FLOAT32)


def test_scores_of_the_backward_pass_are_those_without(device: torch.device) -> None:
    scores = []
    for recomputed in (True, False):
        model = wrapped("mixtral", device)
        if recomputed:
            model.checkpoint_activations()
        batch = batch_for(model)
        model.watch(TokenMasks(batch["attention_mask"]), "taylor", "ghost")
        stepped(model, batch)
        found: dict[str, Tensor | None] = {}
        for layer, routing in enumerate(model.routing):
            assert routing.evidence is not None
            found |= {f"{layer} taylor": routing.evidence.taylor, f"{layer} ghost": routing.evidence.ghost}
        scores.append(found)
    assert is_nonzero([value for name, value in scores[1].items() if name.endswith("ghost")])
    assert_near(scores[0], scores[1], FLOAT32)
