"""An export that does not hold what it says fails."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, DeepseekV3Config

from hfedmoe.config import ModelConfig, load_config
from hfedmoe.errors import UserError
from hfedmoe.export.exporting import _check_not_quantised
from hfedmoe.export.merged import save
from hfedmoe.export.written import check_written
from hfedmoe.models.tiny import tiny_model, tiny_tokenizer
from hfedmoe.moe.prediction import promised, withdraw
from hfedmoe.report.inspection import anatomy_of, as_text
from hfedmoe.report.plan import plan_for


def test_a_written_checkpoint_is_compared_tensor_by_tensor(tmp_path: Path) -> None:
    model = tiny_model(64, 0)
    save(model, tmp_path)
    check_written(model, tmp_path)
    good = load_file(tmp_path / "model.safetensors")
    for change, complaint in (
        ({"lm_head.weight": good["lm_head.weight"] + 1}, "wrong values in lm_head.weight"),
        ({"model.layers.2.block_sparse_moe.experts.7.w2.weight": None}, "wrong values in .*experts.down_proj"),
        ({"model.norm.weight": None}, "does not have model.norm.weight"),
    ):
        tensors = {name: tensor for name, tensor in (good | change).items() if tensor is not None}
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=complaint):
            check_written(model, tmp_path)
    save_file(good, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 1}))
    with pytest.raises(UserError, match="num_experts_per_tok differ"):
        check_written(model, tmp_path)


def test_layers_for_further_tokens_are_named_and_not_promised(tmp_path: Path) -> None:
    config = DeepseekV3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        num_mtp_layers=1,
    )
    config.architectures = ["DeepseekV3ForCausalLM"]
    config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "multi-token prediction: 1 layer(s), which are not loaded" in as_text(anatomy_of(str(tmp_path)))
    assert withdraw(config) == 1
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert promised(again) == again.num_nextn_predict_layers == 0
    assert "multi-token" not in as_text(anatomy_of(str(tmp_path)))


def test_a_checkpoint_that_is_quantised_already_is_not_merged_into_and_not_called_streamed(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tiny_model(len(tokenizer), 0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = [f"model.name={tmp_path}", 'clients.budgets=["2GiB"]']
    assert plan_for(load_config(None, settings)).carved
    config = json.loads((tmp_path / "config.json").read_text())
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": fp8}))
    assert not plan_for(load_config(None, settings)).carved
    for form in ("merged", "client"):
        with pytest.raises(UserError, match=r"is quantised \(fp8\).*--as adapter"):
            _check_not_quantised(ModelConfig(name=str(tmp_path)), form)
    _check_not_quantised(ModelConfig(name=str(tmp_path)), "adapter")
