"""A model without experts is told by its description alone."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import CONFIG_MAPPING, LlamaConfig

from hfedmoe.config import ModelConfig, RunConfig, UpcycleConfig
from hfedmoe.errors import UserError
from hfedmoe.events import Silent
from hfedmoe.models.dense import refuse_dense, refuse_without_experts
from hfedmoe.prepare import prepare
from tests.families.table import FAMILIES

WAY_OUT = r"set model.upcycle = \{ experts = 8, top_k = 2 \}, or another model.name, such as smollm2-domains"


def test_dense_families_are_told_from_config_json(tmp_path: Path) -> None:
    LlamaConfig(hidden_size=32).save_pretrained(tmp_path)
    for name in (str(tmp_path), "smollm2"):
        with pytest.raises(UserError, match=f"model.name = .*: llama has no Mixture-of-Experts layers; {WAY_OUT}"):
            refuse_dense(ModelConfig(name=name))
        refuse_dense(ModelConfig(name=name, upcycle=UpcycleConfig()))
    for name in ("tiny", "smollm2-domains", "owner/model"):
        refuse_dense(ModelConfig(name=name))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "auto_map": {}}')
    refuse_dense(ModelConfig(name=str(tmp_path)))  # its own code may make experts


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tested_family_counts_its_experts(family: str) -> None:
    refuse_without_experts("x", CONFIG_MAPPING[family]())


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "phi3", "qwen3"])
def test_dense_families_count_none(family: str) -> None:
    with pytest.raises(UserError, match=f"model.name = x: {family} has no Mixture-of-Experts layers"):
        refuse_without_experts("x", CONFIG_MAPPING[family]())
    refuse_without_experts("x", SimpleNamespace(auto_map={"AutoConfig": "own.py"}))


def test_a_dense_model_is_refused_before_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CONFIG_MAPPING["qwen3"](hidden_size=32).save_pretrained(tmp_path)
    monkeypatch.setattr("hfedmoe.prepare.load_watched_task", lambda *_: pytest.fail("rows were read"))
    with pytest.raises(UserError, match="qwen3 has no Mixture-of-Experts layers; name a MoE model"):
        prepare(RunConfig(model=ModelConfig(name=str(tmp_path))), Silent())
