"""Tiny random models of every supported family; one entry is all that a new family needs."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "n_routed_experts": 8,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {**COMMON, "intermediate_size": 48, "num_local_experts": 6, "num_experts_per_tok": 2},
    "olmoe": {**COMMON, "intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3},
    "qwen3_moe": {
        **COMMON,
        "head_dim": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
        "num_hidden_layers": 3,
    },
    "deepseek_v2": {
        **COMMON,
        **MLA,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v3": {**COMMON, **MLA, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.0},
    "gpt_oss": {
        **COMMON,
        "head_dim": 8,
        "intermediate_size": 24,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention", "full_attention"],
    },
    "switch_transformers": {
        "vocab_size": 61,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_heads": 4,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_experts": 4,
        "expert_capacity": 16,
        "dropout_rate": 0.0,
        "router_jitter_noise": 0.0,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    },
}


def build(family: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny random model with weights large enough that every part matters, correction biases included."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**{**FAMILIES[family], **changes})
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dim() >= 2 or "bias" in name:
            tensor.data = torch.randn(tensor.shape, generator=generator) * (
                0.5 if "router" in name or ".gate." in name else 0.2
            )
    model.tie_weights()
    return model.train()


def inputs(model: Any, batch: int = 3, length: int = 7, seed: int = 1) -> dict[str, torch.Tensor]:
    """A left-padded batch (the first rows have padding), with decoder inputs where the family wants them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, :1] = 0
    out = {"input_ids": ids * mask, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        out["decoder_input_ids"] = torch.randint(3, 61, (batch, 4), generator=generator)
    return out
