"""The anatomy page: counts and bytes worked out by hand, for every family."""

import json

import pytest

from hfedmoe.errors import UserError
from hfedmoe.report.inspection import anatomy_of, as_text, to_json
from tests.families.table import CORE, build


def saved(family, folder, **changes):
    """The folder of a model's config (there are no weights to load), and its number of parameters."""
    model = build(family, **changes)
    model.config.save_pretrained(folder)
    return str(folder), model.num_parameters()


def test_tiny_by_hand():
    anatomy = anatomy_of("tiny")
    layer = anatomy.layers[0]
    assert (len(anatomy.layers), layer.num_experts, layer.top_k) == (4, 8, 2)
    assert layer.expert_parameters == 3 * 64 * 96
    assert layer.expert_bytes == 4 * 3 * 64 * 96
    assert layer.lora_bytes == 4 * 8 * ((64 + 2 * 96) + (96 + 64))
    assert anatomy.parts["experts"].parameters == 4 * 8 * 3 * 64 * 96
    assert anatomy.parts["routers"].parameters == 4 * 8 * 64
    assert anatomy.parts["attention"].parameters == 4 * (64 * 64 * 2 + 64 * 32 * 2)
    assert anatomy.parts["other"].parameters == 64 * (4 * 2 + 1)  # norms
    assert anatomy.router_problem is None


@pytest.mark.parametrize("family", CORE)
def test_parts_add_up_to_the_model(family, tmp_path):
    folder, parameters = saved(family, tmp_path)
    anatomy = anatomy_of(folder)
    assert anatomy.total.parameters == parameters
    assert anatomy.total.bytes == 4 * parameters
    assert (anatomy.parts["shared experts"].parameters > 0) == family.startswith("deepseek")
    assert json.loads(to_json(anatomy))["total"]["parameters"] == parameters


def test_bytes_follow_the_stored_precision(tmp_path):
    folder, parameters = saved("mixtral", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    anatomy = anatomy_of(folder)
    assert (anatomy.dtype, anatomy.total.bytes) == ("bfloat16", 2 * parameters)


def test_a_router_that_cannot_learn(tmp_path):
    folder, _ = saved("mixtral", tmp_path, num_experts_per_tok=1)
    anatomy = anatomy_of(folder)
    assert anatomy.router_problem is not None
    assert "cannot be trained" in as_text(anatomy)


def test_dense_models_and_what_they_would_become(tmp_path):
    from transformers import BertConfig, LlamaConfig

    LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="--upcycle-experts"):
        anatomy_of(str(tmp_path))
    BertConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    ).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match=r"bert has no Mixture-of-Experts layers; name a MoE model") as refused:
        anatomy_of(str(tmp_path / "bert"))
    assert "--upcycle-experts" not in str(refused.value)  # it would be refused
    anatomy = anatomy_of(str(tmp_path), experts=6, top_k=3)
    assert [(layer.num_experts, layer.top_k) for layer in anatomy.layers] == [(6, 3)] * 3
    assert "0-2" in as_text(anatomy)
