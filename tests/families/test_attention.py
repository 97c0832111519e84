"""LoRA on the attention of every family: on linear maps of the attention only, and the model stays what it was."""

import pytest
import torch

from hfedmoe.moe.anatomy import UnsupportedModelError
from hfedmoe.moe.attention import A
from hfedmoe.moe.model import MoEModel
from tests.families.table import FAMILIES, build, inputs

WITHOUT = {
    "afmoe": "PEFT has no LoRA for this attention",
    "beam": "PEFT has no LoRA for this attention",
    "nemotron_h": "no attention projections",
}
"""What is said of families where it does not work."""


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_the_attention_reaches_the_attention_alone(family: str) -> None:
    if family in WITHOUT:
        with pytest.raises(UnsupportedModelError, match=WITHOUT[family]):
            MoEModel(build(family), experts="frozen", attention=True)
        return
    stock, model = build(family).eval(), MoEModel(build(family), experts="frozen", attention=True)
    x = inputs(stock)
    model.model.eval()
    torch.testing.assert_close(model.model(**x).logits, stock(**x).logits, atol=1e-4, rtol=1e-4)
    model.model(**x).logits.float().logsumexp(-1).sum().backward()
    adapters = [name for name, p in model.model.named_parameters() if ".lora_" in name]
    assert adapters
    assert all(any("att" in part for part in name.lower().split(".")) for name in adapters)
    learning = [name for name, p in model.shared.items() if p.grad is not None and p.grad.any()]
    assert learning  # not all do: an indexer chooses what is attended to, which has no gradient


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_a_that_is_frozen_stays_and_is_the_same_on_every_device(family: str) -> None:
    def adapted(dtype: torch.dtype) -> MoEModel:
        return MoEModel(build(family).to(dtype), experts="frozen", attention=True, freeze_a=True, seed=7)

    model, other = adapted(torch.float32), adapted(torch.bfloat16)
    first = {name: tensor for name, tensor in model.attention.items() if A in name}
    assert first
    assert all(torch.equal(tensor, other.attention[name]) and tensor.any() for name, tensor in first.items())
    assert model.shared.keys() == model.attention.keys() - first.keys(), "A travels although it is frozen"
    model.model(**inputs(model.model)).logits.float().logsumexp(-1).sum().backward()
    assert all(tensor.grad is None for tensor in first.values())
    assert any(tensor.grad is not None and tensor.grad.any() for tensor in model.shared.values())
