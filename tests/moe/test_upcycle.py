"""Upcycling: the same function, shared memory, and a checkpoint that stock transformers loads."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hfedmoe.errors import UserError
from hfedmoe.export.mixtral import upcycle_to_folder, write_mixtral
from hfedmoe.models.tiny import tiny_tokenizer
from hfedmoe.moe.anatomy import UnsupportedModelError, find_moe_layers
from hfedmoe.moe.upcycle import upcycle


def llama(tied: bool = True, **changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    ids = torch.randint(3, 61, (3, 9), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_function_is_unchanged(tied, top_k):
    dense = llama(tied)
    torch.testing.assert_close(logits(upcycle(dense, 4, top_k, 0.5, seed=0)), logits(dense), atol=1e-5, rtol=0)


def test_experts_share_memory_with_each_other_and_the_dense_model():
    dense = llama()
    for layer, own in zip(find_moe_layers(upcycle(dense, 8, 2, 0.02, seed=0)), dense.model.layers, strict=True):
        up, down = layer.experts.gate_up_proj, layer.experts.down_proj
        assert (layer.num_experts, layer.top_k) == (8, 2)
        assert up.stride(0) == down.stride(0) == 0
        assert down.data_ptr() == own.mlp.down_proj.weight.data_ptr()
        assert up.untyped_storage().nbytes() == 2 * 48 * 32 * 4


def test_routers_depend_on_the_seed_only():
    routers = [find_moe_layers(upcycle(llama(), 4, 2, 0.02, seed))[0].router.weight for seed in (0, 0, 1)]
    assert torch.equal(routers[0], routers[1])
    assert not torch.equal(routers[0], routers[2])


def test_what_cannot_be_upcycled():
    with pytest.raises(UnsupportedModelError, match="no biases"):
        upcycle(llama(attention_bias=True), 4, 2, 0.02, 0)
    with pytest.raises(ValueError, match="top_k"):
        upcycle(llama(), 4, 5, 0.02, 0)


@pytest.mark.parametrize("tied", [True, False])
def test_the_checkpoint_loads_with_stock_transformers(tied, tmp_path):
    model = upcycle(llama(tied), 4, 2, 0.5, seed=0)
    write_mixtral(model, tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(loaded), logits(model))
    experts = find_moe_layers(loaded)[0].experts
    assert experts.down_proj.stride(0) > 0  # real tensors now


def test_from_folder_to_folder(tmp_path):
    tokenizer = tiny_tokenizer()
    dense = llama(vocab_size=len(tokenizer))
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    out = tmp_path / "moe"
    out.mkdir()  # an empty folder is welcome
    upcycle_to_folder(str(tmp_path / "dense"), out, experts=4, top_k=2, dtype="bfloat16", seed=0)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    stored = LlamaForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    assert torch.equal(logits(loaded), logits(upcycle(stored, 4, 2, 0.02, seed=0)))
    assert AutoTokenizer.from_pretrained(out)("oil prices")["input_ids"] == tokenizer("oil prices")["input_ids"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        upcycle_to_folder(str(tmp_path / "dense"), tmp_path / "moe", experts=4, top_k=2, dtype="float32", seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
