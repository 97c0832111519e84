"""A masked model against stock models that have the residents only: no part of a router may see an absent expert."""

import dataclasses
from typing import Any

import pytest
import torch

from hfedmoe.export.merged import merge
from hfedmoe.export.personal import COUNT_KEYS, router_groups, shrink
from hfedmoe.moe.model import MoEModel
from tests.families.table import FAMILIES, build, config_of, inputs

LOVED = 3.0
"""Added to the correction biases of absent experts, so that a router that sees them cannot but choose them."""


def counts(config: Any, number: int) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(config)}
    return {key: number for key in COUNT_KEYS if key in fields and isinstance(getattr(config, key), int)}


def changes_of(family: str, variant: dict[str, Any]) -> dict[str, Any]:
    """Experts enough for every group to keep two; no layers that look experts up by token, which none can leave."""
    config = config_of(family, **variant)
    changes = dict(variant)
    if router_groups(config)[0] > 1:
        changes |= counts(config, 16)
    if "hash_moe" in (getattr(config, "mlp_layer_types", None) or []):
        changes["mlp_layer_types"] = ["moe"] * config.num_hidden_layers
    return changes


CASES = [(family, {}) for family in FAMILIES]
CASES += [("deepseek_v2", {"topk_method": "greedy"})]  # without groups; the table's limits the choice to some


@torch.no_grad()
@pytest.mark.parametrize(("family", "variant"), CASES)
def test_masked_outputs_equal_a_stock_model_of_the_residents(family: str, variant: dict[str, Any]) -> None:
    changes = changes_of(family, variant)
    model = MoEModel(build(family, **changes).eval(), experts="frozen")
    x = inputs(model.model)
    if variant:  # the table's are compared in test_families
        expected = build(family, **changes).eval()(**x).logits
        torch.testing.assert_close(model.model(**x).logits, expected, atol=1e-5, rtol=0)
    resident = [(torch.arange(layer.num_experts) + layer.index) % 2 == 0 for layer in model.layers]
    for layer, keep in zip(model.layers, resident, strict=True):
        for owner, name in layer.correction_biases():
            getattr(owner, name).view(-1)[: layer.num_experts][~keep] += LOVED
    model.set_resident(resident)
    masked = model.model(**x).logits
    model.set_resident(None)
    assert not torch.allclose(model.model(**x).logits, masked, atol=1e-3)
    merge(model, torch.float32)
    small = shrink(model, resident)
    stock = build(family, **changes | counts(config_of(family), int(resident[0].sum()))).eval()
    stock.load_state_dict(small.state_dict())
    torch.testing.assert_close(masked, stock(**x).logits, atol=1e-5, rtol=1e-4)
