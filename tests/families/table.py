"""Tiny random models of every supported family; one entry is all that a new family needs."""

import dataclasses
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
    "shared_intermediate_size": 20,
    "shared_experts_intermediate_size": 20,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "d_rel": 8,
    "rel_extent": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(
        ("routed_scaling_factor", "route_scale", "router_scaling_factor", "moe_routed_scaling_factor"), 1.5
    ),
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 32,
    "mamba_d_state": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 2,
}
"""What configs call their sizes, and how large they are here; a family takes what its config has."""

MLA = {"num_key_value_heads": 4}
"""Multi-head latent attention has as many key and value heads as query heads."""
DENSE_FIRST = {"num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"]}
FIRST_K_DENSE = {"num_hidden_layers": 3, "first_k_dense_replace": 1}
BOTH_SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
FULL = {"layer_types": ["full_attention", "full_attention"]}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}

CORE = ("mixtral", "olmoe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "switch_transformers")
"""One family of every build, for tests that take long."""

FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {"num_dense_layers": 1, "num_hidden_layers": 3},
    "aria_text": {},
    "axk1": {**MLA, **DENSE_FIRST},
    "axk2": {**MLA, **BOTH_SPARSE, "gated_norm_rank": 4},
    "bailing_hybrid": {**MLA, **BOTH_SPARSE, **HYBRID, "num_mtp_layers": 0},
    "beam": {**BOTH_SPARSE, **FULL},
    "cohere2_moe": {**BOTH_SPARSE, **FULL, "expert_selection_fn": "sigmoid", "logit_scale": 1.0},
    "deepseek_v2": {**MLA, **FIRST_K_DENSE, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**MLA, **FIRST_K_DENSE},
    "deepseek_v32": {**MLA, **BOTH_SPARSE},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "layer_types": ["sliding_attention", "sliding_attention"],
        "mlp_layer_types": ["moe", "hash_moe"],
        "o_groups": 2,
        "o_lora_rank": 4,
        "hc_mult": 2,
    },
    "dots1": {"num_hidden_layers": 3, "first_k_dense_replace": 1, "layer_types": ["full_attention"] * 3},
    "dots3_note_text": {**MLA, **DENSE_FIRST, "layer_types": ["full_attention"] * 3},
    "ernie4_5_moe": {"moe_layer_start_index": 1, "num_hidden_layers": 3},
    "exaone_moe": {**DENSE_FIRST, "layer_types": ["full_attention"] * 3},
    "flex_olmo": {"num_experts": 6, "num_experts_per_tok": 3},
    "flint": {"layer_types": ["full_attention"] * 3, "num_hidden_layers": 3, "mlp_only_layers": [0]},
    "gemma4_text": {**FULL, "enable_moe_block": True, "hidden_size_per_layer_input": 0, "global_head_dim": 8},
    "glm4_moe": {**FIRST_K_DENSE},
    "glm4_moe_lite": {**MLA, **DENSE_FIRST},
    "glm_moe_dsa": {**MLA, **BOTH_SPARSE},
    "gpt_oss": {**FULL, "num_local_experts": 6, "intermediate_size": 24},
    "granitemoe": {"embedding_multiplier": 2.0, "residual_multiplier": 0.7},
    "granitemoe_swa": {**FULL},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_chunk_size": 8,
    },
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {**DENSE_FIRST},
    "hy_v4": {**MLA, **BOTH_SPARSE, "hc_mult": 2},
    "inkling2_text": {},
    "inkling_text": {**BOTH_SPARSE, "logits_mup_width_multiplier": 1.0},
    "jamba": {
        "num_hidden_layers": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "kimi_linear": {**MLA, **BOTH_SPARSE, **HYBRID},
    "kolibri1": {**FULL},
    "laguna": {**BOTH_SPARSE, **FULL},
    "lfm2_moe": {"num_dense_layers": 1, "num_hidden_layers": 3, "layer_types": ["conv", "conv", "full_attention"]},
    "llama4_text": {
        "num_hidden_layers": 4,
        "num_experts_per_tok": 2,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 40,
    },
    "longcat_flash": {
        **MLA,
        "num_layers": 2,
        "zero_expert_num": 3,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 24,
    },
    "mellum": {**BOTH_SPARSE, **FULL},
    "mimo_v2_flash": {**BOTH_SPARSE, **FULL},
    "minimax": {**HYBRID},
    "minimax_m2": {},
    "minimax_m3_vl_text": {**BOTH_SPARSE, **FULL},
    "mixtral": {"num_local_experts": 6},
    "nemotron_h": {
        "layers_block_type": ["moe", "full_attention", "moe", "linear_attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 8,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 20,
        "moe_latent_size": 16,
    },
    "olmoe": {"intermediate_size": 24, "num_experts_per_tok": 3},
    "phimoe": {"num_local_experts": 6, "router_jitter_noise": 0.4},
    "qwen2_moe": {},
    "qwen3_5_moe_text": {**HYBRID},
    "qwen3_moe": {"norm_topk_prob": True, "mlp_only_layers": [0], "num_hidden_layers": 3},
    "qwen3_next": {**HYBRID},
    "qwen4_exp_text": {
        **HYBRID,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "hc_count": 2,
        "hc_lowrank": 4,
    },
    "solar_open": {},
    "switch_transformers": {
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
        "decoder_start_token_id": 0,
    },
}


def config_of(family: str, **changes: Any) -> Any:
    """The tiny configuration of a family; `changes` come last."""
    kind = CONFIG_MAPPING[family]
    known = {field.name for field in dataclasses.fields(kind)}
    sizes = {name: value for name, value in SIZES.items() if name in known}
    return kind(**{**sizes, **FAMILIES[family], **changes})


def build(family: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny random model with weights large enough that every part matters, correction biases included."""
    torch.manual_seed(seed)
    config = config_of(family, **changes)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    # Other buffers are fixed by the architecture, such as the decay factors of MiniMax.
    learned = [(name, buffer) for name, buffer in model.named_buffers() if "bias" in name or "tid2eid" in name]
    for name, tensor in [*model.named_parameters(), *learned]:
        if "tid2eid" in name:  # experts by token: k different ones
            tensor.data = torch.rand(len(tensor), config.n_routed_experts, generator=generator).topk(2).indices
        elif tensor.is_floating_point() and (tensor.dim() >= 2 or "bias" in name):
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
