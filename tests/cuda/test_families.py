"""Models of every layout of experts on the GPU beside the CPU: outputs and all gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hfedmoe.moe.model import MoEModel
from hfedmoe.moe.routing.tokens import TokenMasks
from tests.cuda.comparing import BFLOAT16, BFLOAT16_GRADIENT, FLOAT32, assert_near, is_nonzero
from tests.cuda.steps import ALPHA, CPU, RANK, batch_for, fill_adapters, stepped, wrapped
from tests.families.table import build

FAMILIES = (
    "olmoe",  # stacked
    "mixtral",
    "qwen3_moe",
    "gpt_oss",  # transposed, with biases and an activation of its own
    "llama4_text",  # weights on the input, sigmoid scores
    "switch_transformers",  # a list of modules, encoder and decoder
    "deepseek_v3",  # shared experts, groups, correction biases
    "jamba",  # hybrid
    "longcat_flash",  # identity experts
)
TOKENS, TOP_K = 40, 2
RELU = {"switch_transformers": 0.5}
"""Bound of gradients in bfloat16: rounding moves some inputs of a ReLU over 0, where its slope jumps (0.2 on a CPU).
The test in float32 is the sharp one."""


@pytest.mark.parametrize("experts", ["lora", "full", "frozen"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_in_float32(family: str, experts: str, device: torch.device) -> None:
    """Routing is each device's own: were an expert chosen otherwise, an error of rounding had become a large one."""
    results = []
    for where in (device, CPU):
        model = wrapped(family, where, experts=experts)
        results.append(stepped(model, batch_for(model)))
    found, reference = results
    assert is_nonzero([value for name, value in reference.items() if name.startswith("grad router")])
    if experts != "frozen":
        assert is_nonzero([value for name, value in reference.items() if ".up" in name])
    assert_near(found, reference, FLOAT32)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "llama4_text"])
def test_masked_residents_and_watched_statistics(family: str, device: torch.device) -> None:
    results = []
    for where in (device, CPU):
        model = wrapped(family, where)
        keep = [torch.arange(moe.num_experts) % 2 == moe.index % 2 for moe in model.layers]
        for own, moe in zip(keep, model.layers, strict=True):
            own[: moe.top_k] = True
        model.set_resident(keep)
        batch = batch_for(model)
        model.watch(TokenMasks(batch["attention_mask"]), "taylor", "ghost")
        found = stepped(model, batch)
        for layer, routing in enumerate(model.routing):
            evidence = routing.evidence
            assert evidence is not None
            found |= {f"{layer} g": evidence.g, f"{layer} routed": evidence.routed, f"{layer} used": evidence.processed}
            for name in ("taylor", "ghost"):
                values = getattr(evidence, name)
                assert values.isnan().tolist() == (~keep[layer]).tolist()
                found[f"{layer} {name}"] = values.nan_to_num(0.0)
        results.append(found)
    assert is_nonzero([value for name, value in results[1].items() if name.endswith("ghost")])
    assert_near(results[0], results[1], FLOAT32)


@pytest.mark.parametrize("experts", ["lora", "full", "frozen"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_in_bfloat16_with_given_routing(family: str, experts: str, device: torch.device) -> None:
    """Rounding could change which experts a router chooses, so the layer is told; the reference has the same weights.

    The reference computes in float32, with weights and inputs that were rounded to bfloat16.
    """
    results = []
    for where, dtype in ((device, torch.bfloat16), (CPU, torch.float32)):
        model = _rounded(family, where, dtype, experts)
        results.append(_layer_alone(model, where, dtype))
    assert is_nonzero([results[1]["grad x"]])
    assert_near(results[0], results[1], BFLOAT16, RELU.get(family, BFLOAT16_GRADIENT))


def _rounded(family: str, device: torch.device, dtype: torch.dtype, experts: str) -> MoEModel:
    """A tiny model whose experts are rounded to bfloat16 and held in `dtype`; LoRA pairs stay float32."""
    model = build(family).bfloat16().to(device, dtype)
    own = MoEModel(model, experts=experts, rank=RANK, alpha=ALPHA)
    fill_adapters(own)
    return own


def _layer_alone(model: MoEModel, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Output and gradients of the experts of the first layer, with drawn routing; some pairs have no expert."""
    state, draws = model.states[0], torch.Generator().manual_seed(7)
    number, hidden = state.layer.num_experts, _hidden(model)
    index = torch.rand(TOKENS, number + 1, generator=draws).topk(TOP_K, dim=1).indices.to(device)
    if state.layout.dispatch in ("one_hot", "weights_on_input"):  # one expert for each row
        index = index[:, :1].contiguous()
    weights = torch.rand(index.shape, generator=draws).to(device).requires_grad_()
    x = torch.randn(TOKENS, hidden, generator=draws).bfloat16().to(device, dtype).requires_grad_()
    out = state.compute(x, index, weights)
    mix = torch.randn(out.shape, generator=draws).bfloat16().to(device, dtype)
    (out * mix).sum().backward()
    found: dict[str, Tensor | None] = {"out": out, "grad x": x.grad, "grad weights": weights.grad}
    for name, leaves in ({} if state.trained is None else state.trained.leaves).items():
        # All experts together: of one with few tokens, a single rounding may be much.
        found[f"grad {name}"] = torch.stack([torch.zeros_like(x) if x.grad is None else x.grad for x in leaves])
    return found


def _hidden(model: MoEModel) -> int:
    config: Any = model.config
    return int(getattr(config, "d_model", None) or config.hidden_size)
