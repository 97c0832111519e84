"""A PEFT adapter and a smaller model of every supported family, loaded with the stock libraries, or refused by name.

Merged models of all families are in tests/families.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from hfedmoe.errors import UserError
from hfedmoe.export.adapter import save_adapter
from hfedmoe.export.merged import merge, save
from hfedmoe.export.personal import COUNT_KEYS, router_groups, shrink
from tests.export.models import fresh, half_of, logits_of, plain, trained
from tests.families.table import FAMILIES, config_of

pytestmark = pytest.mark.parametrize("family", FAMILIES)
TOLERANCE = 1e-5
NO_SUB_MODEL = {"deepseek_v4": "chooses experts by token"}
"""Families that have no sub-model, and what the error says."""


def enough_experts(family: str) -> dict[str, Any]:
    """More experts, where half of the table's would be too few for each group of them."""
    config = config_of(family)
    if router_groups(config)[0] == 1:
        return {}
    fields = {field.name for field in dataclasses.fields(config)}
    return {key: 16 for key in COUNT_KEYS if key in fields and getattr(config, key) == 8}


@torch.no_grad()
def test_peft_loads_the_adapter(family: str, tmp_path: Path) -> None:
    model = trained(fresh(family))
    save_adapter(model, tmp_path, "base")
    x, stock = plain(model.model), fresh(family)
    before, expected = logits_of(stock, x), logits_of(model.model, x)
    assert (expected - before).abs().max() > 0.01
    assert (logits_of(PeftModel.from_pretrained(stock, tmp_path), x) - expected).abs().max() <= TOLERANCE


@torch.no_grad()
def test_transformers_loads_the_sub_model(family: str, tmp_path: Path) -> None:
    model = trained(fresh(family, **enough_experts(family)))
    x, keep = plain(model.model), half_of(model)
    model.set_resident(keep)
    expected = logits_of(model.model, x)
    model.set_resident(None)
    merge(model, torch.float32)
    if family in NO_SUB_MODEL:
        with pytest.raises(UserError, match=f"{family}.*{NO_SUB_MODEL[family]}"):
            shrink(model, keep)
        return
    save(shrink(model, keep), tmp_path)
    small = type(model.model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.model.parameters())
    assert (logits_of(small, x) - expected).abs().max() <= TOLERANCE
