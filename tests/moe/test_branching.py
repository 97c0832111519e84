"""Dense blocks that become MoE layers compute what they computed."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hfedmoe.moe.anatomy import UnsupportedModelError, find_moe_layers
from hfedmoe.moe.branching import branched


def tiny_llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings: dict[str, object] = {
        "vocab_size": 60,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head_dim", [8, 16])
def test_equal_experts_change_nothing_whatever_the_router(tied: bool, head_dim: int) -> None:
    dense = tiny_llama(tie_word_embeddings=tied, head_dim=head_dim)
    model = branched(dense, range(2, 4), experts=8)
    layers = find_moe_layers(model)
    assert [(layer.name, layer.num_experts, layer.top_k) for layer in layers] == [
        ("model.layers.2.mlp", 8, 2),
        ("model.layers.3.mlp", 8, 2),
    ]
    ids = torch.randint(2, 60, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = dense(input_ids=ids).logits
        for scale in (0.0, 0.1, 30.0):
            for layer in layers:
                layer.router.weight.normal_(std=scale)  # type: ignore[operator]
            assert torch.allclose(model(input_ids=ids).logits, wanted, atol=1e-5)
    assert wanted.std() > 0.1  # the comparison is one of numbers that are not small


def test_what_cannot_be_branched_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="biases"):
        branched(tiny_llama(attention_bias=True), [1], experts=4)
    with pytest.raises(ValueError, match="layers from 0 to 3"):
        branched(tiny_llama(), [4], experts=4)
    with pytest.raises(ValueError, match="top_k"):
        branched(tiny_llama(), [3], experts=4, top_k=5)
    with pytest.raises(UnsupportedModelError, match="qwen2_moe"):
        branched(branched(tiny_llama(), [3], experts=4), [3], experts=4)
